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

// Results of a convolution on their way from a warp's sums to the target. Of a tile of 16 x 8 sums, a lane has two
// neighbouring features of two pixels.
template <typename T, typename Layout, typename Shape, typename Form>
class ConvResults {
   public:
    // Two pixels: where the lane's features of a row's first tile are.
    struct Pixels {
        T* target[2];
        const T* residual[2];
        bool inside[2];   // of the image
        bool written[2];  // in the tile, and in the target: a stack has room for pixels outside of the image
    };
    using Brought = Residual<T, Form::kAdds>;

    // Scales and shifts are those of the layout's columns.
    __device__ ConvResults(const Layout& layout, const Conv& c, const ConvTile& tile, int first_feature,
                           const float* scale, const float* shift)
        : layout(layout),
          c(c),
          target(tile.target(c, c.target_strides, c.target_is_stack != 0)),
          residual(tile.target(c, c.residual_strides, false)),
          height(tile.y.size),
          width(tile.x.size),
          first_feature(first_feature),
          scale(scale),
          shift(shift) {}

    __device__ Pixels pixels_of(int m) const {
        const int feature = first_feature + layout.column_of(0);
        Pixels pixels{};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int pixel = layout.row_of(m, r), y = pixel / Shape::kTileW, x = pixel % Shape::kTileW;
            const bool inside = target.contains(y, x);
            pixels.inside[r] = inside;
            pixels.written[r] = (y < height) & (x < width) & (inside | (c.target_is_stack != 0));
            const int offset = pixels.written[r] ? target.offset(y, x) + feature * step(target) : 0;
            pixels.target[r] = static_cast<T*>(c.target) + target.origin + offset;
            // Else it is found again for each tile of a row: large convolutions in float16 took 1.1 times as long.
            // Where depths share the tiles of a row, it is for one of them.
            if constexpr (Layout::kDepth == 1) hold(pixels.target[r]);
            if constexpr (Form::kAdds) {
                const int from = inside ? residual.offset(y, x) + feature * step(residual) : 0;
                pixels.residual[r] = static_cast<const T*>(c.residual) + residual.origin + from;
            }
        }
        return pixels;
    }

    // Asks for what is added to tile n of a row.
    __device__ Brought bring(const Pixels& pixels, int n) const {
        Brought found{};
        if constexpr (Form::kAdds) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!has(n, 0) || !pixels.inside[r]) continue;
                const T* const from = pixels.residual[r] + n * kColumns * step(residual);
                if constexpr (Form::kPaired) {
                    found.of_pixel[r] = load<Vec<T, 2>>(from, 0);
                } else {
                    found.of_pixel[r].lane[0] = from[0];
                    if (has(n, 1)) found.of_pixel[r].lane[1] = from[residual.channel_stride];
                }
            }
        }
        return found;
    }

    // Writes tiles first, first + 1, ... of a row: scaled, shifted, and with what was brought.
    template <int kTiles>
    __device__ void put(const Pixels& pixels, int first, const float (&sums)[kTiles][4],
                        const Brought (&brought)[kTiles]) const {
        Vec<T, 2> results[kTiles][2];
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
            const ChannelAffine<2> affine(scale, shift, c.target_relu != 0, layout.column_of(first + k));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float number[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    number[i] = affine(sums[k][2 * r + i], i);
                    if constexpr (Form::kAdds) number[i] += Addition<T>::begin(brought[k].of_pixel[r].lane[i]);
                    if (!pixels.inside[r]) number[i] = 0.0f;
                }
                results[k][r] = rounded<T, false>(number);
            }
        }
        // One after the other what lies side by side: pixel after pixel.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!pixels.written[r]) continue;
#pragma unroll
            for (int k = 0; k < kTiles; ++k) {
                const int n = first + k;
                if (!has(n, 0)) continue;
                T* const to = pixels.target[r] + n * kColumns * step(target);
                if constexpr (Form::kPaired) {
                    store(to, 0, results[k][r]);
                } else {
                    to[0] = results[k][r].lane[0];
                    if (has(n, 1)) to[target.channel_stride] = results[k][r].lane[1];
                }
            }
        }
    }

   private:
    const Layout& layout;
    const Conv& c;
    const Window target, residual;
    const int height, width, first_feature;
    const float *scale, *shift;

    // From a feature to the next.
    __device__ static int step(const Window& window) { return Form::kPaired ? 1 : window.channel_stride; }

    // Whether there is feature i of the two that the lane has of tile n.
    __device__ bool has(int n, int i) const {
        return first_feature + layout.column_of(n) + i < static_cast<int>(c.features);
    }
};

}  // namespace sbnet
