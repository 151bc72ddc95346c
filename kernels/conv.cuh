// What the convolution kernels share: their argument, tiles of the output, and how results reach a tensor.
#pragma once

#include "transfer.cuh"
#include "window.cuh"

namespace sbnet {

// One axis of a convolution. Block k of the output begins at pixel `start + k * stride`, for 0 <= k < count.
struct ConvAxis {
    int64 count, start, stride, size;  // of blocks of the output
    int64 extent;                      // pixels of the output image
    int64 pad;                         // pixels before the input image
    int64 source_extent;               // pixels of the input image, or of a block of the input stack
};

// Argument of conv. Mirrored, field by field, by _fused.py. Strides are in numbers.
struct Conv {
    const void* source;           // [batch, H, W, channels], or a stack [rows, h, w, channels] of its blocks
    void* target;                 // [batch, H_out, W_out, features], or a stack
    const void* residual;         // added to the result, of the target's shape; may be the target; or null
    const StepWords* weights;     // packed
    const int* indices;           // [rows, 3]
    const int* bin_counts;        // [1]
    const float* source_scale;    // [channels], or null
    const float* source_shift;    // [channels], or null
    const float* target_scale;    // [features], or null
    const float* target_shift;    // [features], or null
    int64 source_strides[4];
    int64 target_strides[4];
    int64 residual_strides[4];
    int64 index_strides[2];
    int64 rows, batch;
    int64 channels, features;
    ConvAxis height, width;
    int64 tiles;                  // of a block
    Divisor by_tiles, by_tiles_w;
    int64 tiles_w;
    int64 chunks;                 // times that kChunk pieces of a pixel are staged
    int64 source_is_stack, target_is_stack;
    int64 source_relu, target_relu;
};

// Its tensors: whether the input comes in whole pieces, the output (and the residual) in aligned pairs of features;
// whether a step comes before; whether a residual is added; and whether there is more than one chunk.
template <bool kWhole_, bool kPaired_, bool kActivates_, bool kAdds_, bool kChunks_>
struct ConvForm {
    static constexpr bool kWhole = kWhole_, kPaired = kPaired_, kActivates = kActivates_, kAdds = kAdds_;
    static constexpr bool kChunks = kChunks_;
};

// A tile of the output, and the window of the input that it is computed from.
struct ConvTile {
    bool exists;
    unsigned int image, row;
    Span y, x;

    template <typename Shape>
    __device__ ConvTile(const Conv& c, const TileNumbers& at, Shape)
        : exists(at.exist(c)),
          image(at.image),
          row(at.row),
          y(begin(c.height, exists ? at.block_h : 0), c.height.size, at.down, Shape::kTileH),
          x(begin(c.width, exists ? at.block_w : 0), c.width.size, at.right, Shape::kTileW) {}

    template <typename Shape>
    __device__ Window source(const Conv& c, Shape) const {
        const bool stack = c.source_is_stack != 0;
        const int top = (stack ? y.within : y.first) * Shape::kStrideH - (stack ? 0 : static_cast<int>(c.height.pad));
        const int left = (stack ? x.within : x.first) * Shape::kStrideW - (stack ? 0 : static_cast<int>(c.width.pad));
        Window window = window_at(c.source_strides, stack, top, left);
        inside_of(top, Shape::kWindowH, static_cast<int>(c.height.source_extent), window.top, window.bottom);
        inside_of(left, Shape::kWindowW, static_cast<int>(c.width.source_extent), window.left, window.right);
        return window;
    }

    // Of the target or, for the same pixels, of the residual. Pixels "in the tensor" are those in the image: a stack
    // has room for the others too.
    __device__ Window target(const Conv& c, const int64 (&strides)[4], bool stack) const {
        Window window = window_at(strides, stack, stack ? y.within : y.first, stack ? x.within : x.first);
        inside_of(y.first, y.size, static_cast<int>(c.height.extent), window.top, window.bottom);
        inside_of(x.first, x.size, static_cast<int>(c.width.extent), window.left, window.right);
        return window;
    }

   private:
    // The first pixel of a block that exists: no coordinates that leave 32 bits.
    __device__ static int begin(const ConvAxis& axis, unsigned int block) {
        return static_cast<int>(axis.start) + static_cast<int>(block) * static_cast<int>(axis.stride);
    }

    __device__ Window window_at(const int64 (&strides)[4], bool stack, int top, int left) const {
        Window window;
        window.row_stride = static_cast<int>(strides[1]);
        window.column_stride = static_cast<int>(strides[2]);
        window.channel_stride = static_cast<int>(strides[3]);
        window.origin = static_cast<int64>(stack ? row : image) * strides[0] +
                        static_cast<int64>(top) * window.row_stride + static_cast<int64>(left) * window.column_stride;
        return window;
    }
};

// What is added to two neighbouring features of two pixels, if anything is.
template <typename T, bool kAdds>
struct Residual {
    Vec<T, 2> of_pixel[2];
};
template <typename T>
struct Residual<T, false> {};

// Reads two neighbouring features of a pixel.
template <typename T, typename Form>
__device__ inline Vec<T, 2> get_pair(const T* from, bool has_second, int stride) {
    if constexpr (Form::kPaired) return load<Vec<T, 2>>(from, 0);
    Vec<T, 2> pair{};
    pair.lane[0] = from[0];
    if (has_second) pair.lane[1] = from[stride];
    return pair;
}

// Writes two neighbouring features of a pixel.
template <typename T, typename Form>
__device__ inline void put_pair(T* to, const float (&number)[2], bool has_second, int stride) {
    const auto result = rounded<T, false>(number);
    if constexpr (Form::kPaired) {
        store(to, 0, result);
    } else {
        to[0] = result.lane[0];
        if (has_second) to[stride] = result.lane[1];
    }
}

}  // namespace sbnet
