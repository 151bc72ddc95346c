// An element-wise step on a stack: act(x * scale + shift) on pixels inside of the image, 0 on all others and in rows
// out of use. That is what the next convolution of a dense network would read, the zeros of its padding included.
#include "affine.cuh"
#include "transfer.cuh"

namespace sbnet {

// Argument of activate. Mirrored, field by field, by _activate.py. Strides are in words of kLanes numbers. The block
// size is a run-time number here: one kernel serves stacks of any size and whole images.
struct Activation {
    const void* source;     // [rows, block_h, block_w, words]
    void* target;           // the same shape; may be the source itself
    const int* indices;     // [rows, 3], on the grid of this stack's pixels; null: all pixels are inside
    const int* bin_counts;  // [1]
    const void* scale;      // [channels], or null
    const void* shift;      // [channels], or null
    int64 source_strides[4];
    int64 target_strides[4];
    int64 index_strides[2];
    int64 batch;
    int64 block_h, block_w;
    int64 words;  // of a pixel
    int64 relu;
    Axis height, width;
};

// In-image part of the block of a row; all of it where there are no indices.
template <typename Index>
__device__ inline Rect<Index> inside_of(const Activation& a, int64 row) {
    if (a.indices == nullptr) return {0, static_cast<Index>(a.block_h), 0, static_cast<Index>(a.block_w)};
    Transfer t{};
    t.indices = a.indices;
    t.bin_counts = a.bin_counts;
    t.index_strides[0] = a.index_strides[0];
    t.index_strides[1] = a.index_strides[1];
    t.batch = a.batch;
    t.height = a.height;
    t.width = a.width;
    // The block size is no parameter of where a block lies; what it covers is cut to the image here.
    const auto at = place<unsigned long long, 1, 1>(t, row);
    if (!at.touches_image) return {0, 0, 0, 0};
    const int64 y = a.height.start + at.cell_h * a.height.stride;
    const int64 x = a.width.start + at.cell_w * a.width.stride;
    const int64 bottom = a.height.extent - y;
    const int64 right = a.width.extent - x;
    return {static_cast<Index>(y < 0 ? -y : 0), static_cast<Index>(bottom < a.block_h ? bottom : a.block_h),
            static_cast<Index>(x < 0 ? -x : 0), static_cast<Index>(right < a.block_w ? right : a.block_w)};
}

// Pixels that a thread loads before it stores the first.
constexpr int kLoads = 4;

// A CTA takes a slice of the pixels of one row. threadIdx.x counts words of a pixel, so that a thread keeps its
// channels, and their scales and shifts, in registers; threadIdx.y counts pixels.
// Registers: at most 128.
template <typename In, typename Out, int kLanes, typename Index>
__global__ void __launch_bounds__(kMaxThreads, 2) activate(const Activation a) {
    const Rect<Index> inside = inside_of<Index>(a, blockIdx.x);
    const bool is_empty = inside.row_begin >= inside.row_end || inside.column_begin >= inside.column_end;
    const Index block_w = static_cast<Index>(a.block_w);
    const Index pixels = static_cast<Index>(a.block_h) * block_w;
    const Index step = blockDim.y * gridDim.y;
    const int64 source = blockIdx.x * a.source_strides[0];
    const int64 target = blockIdx.x * a.target_strides[0];
    for (int64 word = threadIdx.x; word < a.words; word += blockDim.x) {
        const Affine<In, kLanes> affine(a.scale, a.shift, a.relu != 0, word * kLanes);
        for (Index first = blockIdx.y * blockDim.y + threadIdx.y; first < pixels; first += kLoads * step) {
            Vec<In, kLanes> number[kLoads];
            int64 place_in_target[kLoads];
            bool is_inside[kLoads];
#pragma unroll
            for (int u = 0; u < kLoads; ++u) {
                // Loads are not put behind a branch, where they would wait for each other: the last pixel stands in for
                // those past the end. But rows out of use are not read.
                const Index pixel = first + u * step < pixels ? first + u * step : pixels - 1;
                const Index row = pixel / block_w;
                const Index column = pixel - row * block_w;
                is_inside[u] = inside.contains(row, column);
                place_in_target[u] = target + static_cast<int64>(row) * a.target_strides[1] +
                                     static_cast<int64>(column) * a.target_strides[2] + word * a.target_strides[3];
                const int64 offset = source + static_cast<int64>(row) * a.source_strides[1] +
                                     static_cast<int64>(column) * a.source_strides[2] + word * a.source_strides[3];
                number[u] = Vec<In, kLanes>{};
                if (!is_empty) number[u] = load<Vec<In, kLanes>>(a.source, offset);
            }
#pragma unroll
            for (int u = 0; u < kLoads; ++u) {
                if (first + u * step >= pixels) break;
                Vec<Out, kLanes> result{};
                if (is_inside[u]) result = affine.template map<Out>(number[u]);
                store(a.target, place_in_target[u], result);
            }
        }
    }
}

}  // namespace sbnet
