// The convolution of conv.cu by warpgroups, for Hopper: its tensor cores read the window and the weights from shared
// memory, so that no thread brings matrices to registers, and a tile needs fewer instructions by far. Tiles are squares
// of 8 x 8 pixels, strides are 1, and pixels are whole pieces of 16 bytes. No step comes before it, and no residual after
// it: bottlenecks of three launches took up to 1.26 times as long where this was the last of them.
#include "conv.cuh"
#include "warpgroup.cuh"

namespace sbnet {

// What it is made for: the tile of Layout; pixels of the kernel; the pieces of a pixel that are staged at a time; the
// parts in which their weights come, so that the first are multiplied while the last are on their way; and the order of
// features.
template <typename Layout, int kKernelH, int kKernelW, int kChunk_, int kParts_, int kTogether_>
struct WgmmaShape {
    static constexpr int kTogether = kTogether_;
    using Order = FeatureOrder<kTogether>;
    static constexpr int kTileH = Layout::kTileH, kTileW = Layout::kTileW, kStrideH = 1, kStrideW = 1;
    static constexpr int kWindowH = kTileH + kKernelH - 1, kWindowW = kTileW + kKernelW - 1, kChunk = kChunk_;
    using Depth = PlaneDepth<kChunk, kKernelH, kKernelW, Layout::kDepth>;
    using Planes = PixelPlanes<kChunk, kWindowH, kWindowW>;
    static constexpr int kWindowBytes = Planes::kBytes + (Depth::kIsOdd ? Planes::kPieceStep : 0);
    static constexpr int kWeightRows = Depth::kWeightRows, kWeightBytes = kWeightRows * Layout::kAllColumns * kPieceBytes;
    static constexpr int kParts = kParts_;
    static_assert(kParts <= Depth::kSteps, "a part has a step");
};

// Starts to copy the weights of some columns to shared memory: one part of the rows from number `first` on, of each
// share of the depth. In turns of all threads, whose number is known, so that nothing branches.
template <typename Shape, typename Layout, int kPart>
__device__ inline void start_weights(unsigned char* shared, const Conv& c, int first) {
    using Depth = typename Shape::Depth;
    constexpr int kBegin = 2 * Depth::part_begin(kPart, Shape::kParts) * Layout::kAllColumns;
    constexpr int kEnd = 2 * Depth::part_begin(kPart + 1, Shape::kParts) * Layout::kAllColumns;
    const int columns = (static_cast<int>(c.features) + kColumns - 1) / kColumns * kColumns;
    const StepWords* packed = c.weights + static_cast<int64>(first) * columns + blockIdx.y * Layout::kAllColumns;
    const auto copy = [&](int k) {
        const int row = k / Layout::kAllColumns, column = k % Layout::kAllColumns;
        copy_async<kPieceBytes>(shared + k * kPieceBytes, packed + (row * columns + column), true);
    };
    constexpr int kTurns = (kEnd - kBegin) / kProductThreads, kLeft = (kEnd - kBegin) % kProductThreads;
#pragma unroll
    for (int share = 0; share < Depth::kShares; ++share) {
        const int begin = kBegin + share * 2 * Depth::kSteps * Layout::kAllColumns + static_cast<int>(threadIdx.x);
#pragma unroll 8
        for (int turn = 0; turn < kTurns; ++turn) copy(begin + turn * kProductThreads);
        if (static_cast<int>(threadIdx.x) < kLeft) copy(begin + kTurns * kProductThreads);
    }
}

// Scales and shifts of the features that a CTA's columns are, to shared memory.
template <typename Shape, typename Layout>
__device__ inline void share_features(float* scales, float* shifts, const Conv& c, int first_column) {
    for (int k = threadIdx.x; k < Layout::kAllColumns; k += kProductThreads) {
        const int feature = Shape::Order::feature_of(first_column + k);
        const bool exists = feature < c.features;
        scales[k] = c.target_scale != nullptr && exists ? load_constant(c.target_scale + feature) : 1.0f;
        shifts[k] = c.target_shift != nullptr && exists ? load_constant(c.target_shift + feature) : 0.0f;
    }
}

// Where a thread's results go. Found before the products, while the window is on its way.
template <typename T, typename Layout, typename Shape>
struct SquareResults {
    // Of each 8 columns, a thread has two; those of so many are neighbouring features.
    static constexpr int kM = Layout::kM, kN = Layout::kN, kThreadRows = Layout::kThreadRows;
    static constexpr int kTogether = kN < Shape::kTogether ? kN : Shape::kTogether;
    static constexpr int kLanes = 2 * kTogether, kRuns = kN / kTogether;
    static_assert(kN % kTogether == 0 && Shape::kTogether % kTogether == 0, "runs of features do not overlap");

    // Of a pixel; null if there is no such pixel.
    T* to[kM][kThreadRows];
    bool inside[kM][kThreadRows];  // of the image; else zeros are written, to a stack
    int features, first_column;
    float least;  // of a result

    SquareResults() = default;

    __device__ SquareResults(const Conv& c, const ConvTile& tile, const Layout& layout, int cta_column)
        : features(static_cast<int>(c.features)),
          first_column(cta_column + layout.column + static_cast<int>(threadIdx.x) % 4 * 2),
          least(c.target_relu != 0 ? 0.0f : -__int_as_float(0x7f800000)) {
        const bool stack = c.target_is_stack != 0;
        const Window target = tile.target(c, c.target_strides, stack);
        T* const target_tile = static_cast<T*>(c.target) + target.origin;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < kThreadRows; ++r) {
                const int y = layout.y(m, r), x = layout.x(m);
                inside[m][r] = target.contains(y, x);
                const bool exists = y < tile.y.size && x < tile.x.size && (inside[m][r] || stack);
                to[m][r] = exists ? target_tile + target.offset(y, x) : nullptr;
                hold(to[m][r]);
            }
        }
    }

    // Scales and shifts are those of the group's columns.
    __device__ void write(const GroupSums<Layout>& sums, const float* scales, const float* shifts) const {
        const int lane_column = static_cast<int>(threadIdx.x) % 4 * 2;
        Vec<float, 2> scale[kN], shift[kN];  // all of them before the first result, which could be the same memory
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            scale[n] = load_lanes<float, 2>(scales, lane_column + n * kColumns);
            shift[n] = load_lanes<float, 2>(shifts, lane_column + n * kColumns);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < kThreadRows; ++r) {
                if (to[m][r] == nullptr) continue;
#pragma unroll
                for (int run = 0; run < kRuns; ++run) {
                    float number[kLanes];
#pragma unroll
                    for (int i = 0; i < kLanes; ++i) {
                        const int n = run * kTogether + i / 2;
                        const float sum = sums.at[m][n][2 * r + i % 2];
                        number[i] = max_exact(fma_exact(sum, scale[n].lane[i % 2], shift[n].lane[i % 2]), least);
                        if (!inside[m][r]) number[i] = 0.0f;
                    }
                    const int feature = feature_of(run);
                    if (feature < features) store(to[m][r] + feature, 0, rounded<T, false>(number));
                }
            }
        }
    }

    __device__ int feature_of(int run) const {
        return Shape::Order::feature_of(first_column + run * kTogether * kColumns);
    }
};

// The windows and weights of a tile in shared memory, chunk after chunk: of several, two at a time.
template <typename T, typename Layout, typename Shape, bool kSeveral>
struct Chunks {
    using Staged = SharedWindow<T, Shape::kChunk, typename Shape::Planes>;
    static constexpr int kBytes = Shape::kWeightBytes + Shape::kWindowBytes, kParts = Shape::kParts;
    // float32 comes through registers, to be rounded to TF32, halves as they are.
    static constexpr bool kRounds = sizeof(T) == 4;
    static constexpr int kGroups = kParts + (kRounds ? 0 : 1);  // of asynchronous copies of a chunk

    const Conv& c;
    unsigned char* memory;
    Window window;
    typename Staged::Numbers numbers;

    __device__ unsigned char* weights(int chunk) const { return memory + (kSeveral ? chunk % 2 * kBytes : 0); }
    __device__ unsigned char* pixels(int chunk) const { return weights(chunk) + Shape::kWeightBytes; }

    // What goes with the last number, where they are odd. There is a single chunk then.
    __device__ void clear_zeros() const {
        if constexpr (Shape::Depth::kIsOdd) {
            unsigned char* zeros = pixels(0) + Shape::Planes::kBytes;
            for (int k = threadIdx.x; k < Shape::Planes::kPieceStep / kPieceBytes; k += kProductThreads) {
                store(zeros + k * kPieceBytes, 0, Vec<int, 4>{});
            }
        }
    }

    // Each part is a group of copies.
    __device__ void start_weights_of(int chunk) const {
        for_parts<kParts>([&](auto part) {
            start_weights<Shape, Layout, part.value>(weights(chunk), c, chunk * Shape::kWeightRows);
            commit_async();
        });
    }

    __device__ void start_window(int chunk) {
        const Staged staged{pixels(chunk)};
        const T* source = static_cast<const T*>(c.source);
        const int channel = chunk * Shape::kChunk * kPiece<T>, channels = static_cast<int>(c.channels);
        if constexpr (kRounds) {
            staged.fetch(numbers, window, source, channel, channels);
        } else {
            staged.template start<true>(window, source, channel, channels);
            commit_async();
        }
    }

    // Puts numbers that have come through registers in their place.
    __device__ void finish_window(int chunk) const {
        if constexpr (kRounds) Staged{pixels(chunk)}.put(numbers);
    }
};

// A CTA takes some features (blockIdx.y tells which) of one tile; the grid has room for more blocks than are active.
// Chunks of the channels are staged, with their weights, while those before are multiplied.
// Registers: at most 255, or 128 where a multiprocessor is to hold two CTAs (kCtas).
template <typename T, typename Layout, typename Shape, bool kSeveral, int kCtas>
__global__ void __launch_bounds__(kProductThreads, kCtas) conv_wgmma(const Conv c) {
    using Staging = Chunks<T, Layout, Shape, kSeveral>;
    constexpr int kParts = Shape::kParts;
    extern __shared__ StepWords conv_wgmma_shared[];
    float* target_scale = reinterpret_cast<float*>(conv_wgmma_shared);
    float* target_shift = target_scale + Layout::kAllColumns;

    assume(threadIdx.x < kProductThreads);
    const Layout layout;
    const int first_column = blockIdx.y * Layout::kAllColumns;
    Staging staging{c, reinterpret_cast<unsigned char*>(target_shift + Layout::kAllColumns)};
    staging.clear_zeros();

    // All that follows from the block is found before earlier kernels are done. Most often, the list of blocks is as it
    // was before they ran; whether it is, will be seen while the window is on its way.
    TileNumbers at(c, blockIdx.x, Freshly()), listed;
    int64 active;
    bool exists;
    SquareResults<T, Layout, Shape> results;
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
        const ConvTile tile(c, at, Shape());
        exists = tile.exists;
        staging.window = tile.source(c, Shape());
        results = SquareResults<T, Layout, Shape>(c, tile, layout, first_column);
        if (is_first) {
            wait_for_earlier_kernels();
            active = load_fresh(c.bin_counts);
            listed = TileNumbers(c, blockIdx.x, Freshly());
        }
        if (exists) {
            staging.start_window(0);
            // Behind a window that comes through registers, weights need not wait for the list.
            if (Staging::kRounds) staging.start_weights_of(0);
        }
        if (!is_first || listed == at) break;
        at = listed;
        wait_async();  // for what goes to the same places
    }
    __syncwarp();
    const int64 tiles = (active < c.rows ? active : c.rows) * c.tiles;
    if (blockIdx.x >= tiles || !exists) return;
    if (!Staging::kRounds) staging.start_weights_of(0);
    share_features<Shape, Layout>(target_scale, target_shift, c, first_column);
    staging.finish_window(0);

    GroupSums<Layout> sums;
    const int chunks = kSeveral ? static_cast<int>(c.chunks) : 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const GroupProduct<T, typename Shape::Planes, typename Shape::Depth, Layout> product(
            staging.pixels(chunk), staging.weights(chunk), layout);
        const bool more = chunk + 1 < chunks;
        for_parts<kParts>([&](auto part) {
            // Groups of copies behind this part: the parts after it, and from part 1 on the next chunk.
            constexpr int kPart = part.value, kNext = kSeveral && kPart > 0 ? Staging::kGroups : 0;
            wait_async_groups<kParts - 1 - kPart + kNext>();
            show_to_warpgroups();
            __syncthreads();
            if (kSeveral && kPart == 0) {
                if (more) {  // to the memory of the chunk before this one
                    staging.start_window(chunk + 1);
                    staging.start_weights_of(chunk + 1);
                } else {
                    for (int k = 0; k < Staging::kGroups; ++k) commit_async();
                }
            }
            begin_warpgroup_products();
            product.template add<Shape::Depth::part_begin(kPart, kParts), Shape::Depth::part_begin(kPart + 1, kParts)>(
                sums, chunk > 0);
        });
        if (more) staging.finish_window(chunk + 1);
        finish_warpgroup_products();
    }
    sums.hold();
    let_later_kernels_start();
    sums.exchange(staging.memory + (kSeveral ? 2 : 1) * Staging::kBytes, layout);
    results.write(sums, target_scale + layout.column, target_shift + layout.column);
}

}  // namespace sbnet
