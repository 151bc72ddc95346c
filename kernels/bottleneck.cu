// A residual bottleneck with pre-activation on the active blocks of images, in one launch. A CTA takes a tile of pixels
// and keeps all that it needs in shared memory:
//
//     window  x                                                           of the tile and its halo
//     middle  max(conv1(max(x * scale1 + shift1, 0)) * scale2 + shift2, 0)  of the same pixels, 0 outside of the image
//     middle  max(conv2(middle) * scale3 + shift3, 0)                       of the tile
//     target  x + conv3(middle)
//
// The window stays as it is, for the sum at the end: the first step is done on the way into the first product.
//
// In place, a CTA must not write what is the halo of another that has not read it. All CTAs therefore run at the same
// time (the host launches no more than fit, as a cooperative grid), count themselves when their window is there, and
// write only when all have. The count is long complete by then: most of a CTA's work lies between.
#include "bottleneck.cuh"

namespace sbnet {

// Where the weights of a product come from: shared memory (kNear), or each warp's own on their way, at least two steps
// ahead.
template <bool kNear, typename Products, int kN>
struct WeightSource {
    using Type = DistantWeights<Products, kN, 2>;
};
template <typename Products, int kN>
struct WeightSource<true, Products, kN> {
    using Type = NearWeights<Products, kN>;
};

// The weights of some steps of a product of kSteps.
template <typename Products, typename Layout, int kSteps, bool kNear>
struct ProductWeights {
    static constexpr int kStride = kSteps * kWarp;  // from 8 columns to the next 8

    int begin, end;  // the warp's share of the steps
    typename WeightSource<kNear, Products, Layout::kN>::Type source;

    // Of `steps` steps from `first` on, of the columns from `packed` on.
    __device__ explicit ProductWeights(const StepWords* packed, int first = 0, int steps = kSteps,
                                       const Layout& layout = Layout())
        : begin(first + layout.begin(steps)),
          end(first + layout.end(steps)),
          source(packed + layout.column / kColumns * kStride, kStride, begin, end) {}
};

// Starts to copy `part` of the steps of the weights of so many columns to shared memory.
template <int kAllColumns, int kSteps, int kPartSteps = kSteps>
__device__ inline void start_weights(StepWords* shared, const StepWords* packed, int part = 0) {
    constexpr int kPieces = kAllColumns / kColumns * kPartSteps * kWarp;
#pragma unroll
    for (int begin = 0; begin < kPieces; begin += kProductThreads) {
        const int k = begin + static_cast<int>(threadIdx.x);
        if (begin + kProductThreads > kPieces && k >= kPieces) break;
        const int piece = k + (k / (kPartSteps * kWarp) * (kSteps - kPartSteps) + part * kPartSteps) * kWarp;
        copy_async<kPieceBytes>(shared + piece, packed + piece, true);
    }
}

// Adds one product to the sums of all warps. Row m begins at `row_at(m)` in `matrix`; `before` changes what it reads.
template <int kCtas, typename Products, typename Layout, int kSteps, bool kNear, typename RowAt, typename Offsets,
          typename Before = Unchanged>
__device__ inline void product(Sums<Layout::kM, Layout::kN>& sums, const unsigned char* matrix, RowAt row_at,
                               Offsets offsets, const unsigned char* zeros,
                               ProductWeights<Products, Layout, kSteps, kNear>& weights,
                               const Before& before = Before()) {
    const Layout layout;
    const unsigned char* rows[Layout::kM][Products::kLaneRows];
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
        for (int r = 0; r < Products::kLaneRows; ++r) {
            rows[m][r] = matrix + row_at(layout.row + m * kRows + Products::row_of(threadIdx.x % kWarp, r));
        }
    }
    Products::template run<kCtas>(sums, rows, offsets, zeros, weights.source, weights.begin, weights.end, before);
}

// The step between two convolutions, from the sums of one product to the matrix of the next. `is_inside` tells which
// pixels the dense network has; it pads with zeros. What is loaded is, before anything is stored: the compiler cannot
// know that these are different places.
template <typename Products, typename Rows, typename Layout, typename IsInside>
__device__ inline void activate_sums(unsigned char* matrix, unsigned char* exchanged, const Layout& layout,
                                     const Sums<Layout::kM, Layout::kN>& sums, const float* scale, const float* shift,
                                     IsInside is_inside) {
    using T = typename Products::Number;
    float totals[Layout::kTotals][4];
    layout.add_parts(exchanged, sums, totals);
    Vec<float, 2> scales[Layout::kTotals], shifts[Layout::kTotals];
#pragma unroll
    for (int turn = 0; turn < Layout::kTotals; ++turn) {
        const int column = layout.column_of(layout.total_tile(turn) % Layout::kN);
        scales[turn] = load_lanes<float, 2>(scale, column);
        shifts[turn] = load_lanes<float, 2>(shift, column);
    }
#pragma unroll
    for (int turn = 0; turn < Layout::kTotals; ++turn) {
        const int m = layout.total_tile(turn) / Layout::kN, n = layout.total_tile(turn) % Layout::kN;
        unsigned char* const of_column = matrix + layout.column_of(n) * static_cast<int>(sizeof(T));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int pixel = layout.row_of(m, r);
            const bool inside = is_inside(pixel);
            float number[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float y = fma_exact(totals[turn][2 * r + i], scales[turn].lane[i], shifts[turn].lane[i]);
                number[i] = inside ? max_exact(y, 0.0f) : 0.0f;
            }
            if (!layout.has_total(turn) || pixel >= Rows::kPixels) continue;
            store(of_column + Rows::offset(pixel), 0, rounded<T, Products::kRounds>(number));
        }
    }
}

// Bytes of a window that are asked for at once, where it comes in parts. A thread stands still while too much is on its
// way: on an H100, 0.5 us less where the last 43 of 130 KB waited for the first product, and 0.3 more of 67 KB.
constexpr int kMostBytes = 96 << 10;

// Bit k of kNear tells that the weights of product k are kept in shared memory. The window comes in kParts parts of its
// channels, so that the first are multiplied while the last are on their way.
// Registers: at most 255, or 128 where a multiprocessor is to hold two CTAs (kCtas).
template <typename Products, int kC, int kB, int kTileH, int kTileW, int kKernelH, int kKernelW, int kChunk1, int kChunk2,
          int kChunk3, typename Layout1, typename Layout2, typename Layout3, int kNear, int kParts, int kCtas>
__global__ void __launch_bounds__(kProductThreads, kCtas) bottleneck(const Bottleneck b) {
    using T = typename Products::Number;
    constexpr int kLanes = kPiece<T>;
    constexpr int kHaloH = kTileH + kKernelH - 1, kHaloW = kTileW + kKernelW - 1;
    constexpr int kPiecesC = kC / kLanes, kPiecesB = kB / kLanes;
    using WindowRows = PixelRows<kPiecesC, kHaloH, kHaloW>;          // read by pixels of the halo
    using HaloRows = PixelRows<kPiecesB, kHaloH, kHaloW, kTileW>;    // by those of the tile, under the kernel
    using TileRows = PixelRows<kPiecesB, kTileH, kTileW>;
    using Staged = SharedWindow<T, kPiecesC / kParts, WindowRows>;
    using Depth1 = Depth<kPiecesC, kChunk1>;
    using Depth2 = Depth<kPiecesB, kChunk2, kKernelH, kKernelW>;
    using Depth3 = Depth<kPiecesB, kChunk3>;
    constexpr int kSteps1 = Depth1::kSteps, kSteps2 = Depth2::kSteps, kSteps3 = Depth3::kSteps;
    static_assert(kParts == 1 || (kSteps1 % kParts == 0 && kSteps1 * kStepPieces == kPiecesC), "parts are whole steps");
    static_assert(kParts == 1 || (kNear & 1) != 0, "weights of parts are near");
    static_assert(kC % kColumns == 0 && kB % kColumns == 0, "channels fill pieces and columns");
    static_assert(Layout1::kAllRows >= WindowRows::kPixels && Layout1::kAllColumns == kB, "the first product is whole");
    static_assert(Layout2::kAllRows >= TileRows::kPixels && Layout2::kAllColumns == kB, "the second product is whole");
    static_assert(Layout3::kAllRows >= TileRows::kPixels && kC % Layout3::kAllColumns == 0, "the third product is whole");
    static_assert(Layout3::kDepth == 1, "the third product is not deep");

    // The tile between the last two products takes the place of what the second has read.
    extern __shared__ StepWords bottleneck_shared[];
    unsigned char* zeros = reinterpret_cast<unsigned char*>(bottleneck_shared);
    int* list1 = reinterpret_cast<int*>(zeros + kPieceBytes);
    int* list2 = list1 + kSteps1 * kStepPieces;
    int* list3 = list2 + kSteps2 * kStepPieces;
    float* norms = reinterpret_cast<float*>(list3 + kSteps3 * kStepPieces);
    float *scale2 = norms + 2 * kC, *shift2 = scale2 + kB, *scale3 = shift2 + kB, *shift3 = scale3 + kB;
    constexpr bool kNear1 = (kNear & 1) != 0, kNear2 = (kNear & 2) != 0, kNear3 = (kNear & 4) != 0;
    StepWords* near1 = reinterpret_cast<StepWords*>(shift3 + kB);
    StepWords* near2 = near1 + (kNear1 ? kB / kColumns * kSteps1 * kWarp : 0);
    StepWords* near3 = near2 + (kNear2 ? kB / kColumns * kSteps2 * kWarp : 0);
    unsigned char* middle = reinterpret_cast<unsigned char*>(near3 + (kNear3 ? kC / kColumns * kSteps3 * kWarp : 0));
    unsigned char* window_pixels = middle + HaloRows::kBytes;
    unsigned char* exchanged = window_pixels + WindowRows::kBytes;  // parts of sums

    assume(threadIdx.x < kProductThreads);  // which spares a tenth of all instructions
    if (threadIdx.x == 0) store(zeros, 0, Vec<int, 4>{});
    const auto offsets1 = pieces_of<WindowRows, Depth1>(list1);
    const auto offsets2 = pieces_of<HaloRows, Depth2>(list2);
    const auto offsets3 = pieces_of<TileRows, Depth3>(list3);
    wait_for_earlier_kernels();

    const TileNumbers tile(b, blockIdx.x);
    const int64 active = *b.bin_counts;
    // While the indices are on their way: what does not depend on them.
    using Activated = ActivatedRows<T, kPiecesC, kSteps1, Products::kRounds>;
    Activated::start(norms, b.channels);
    for (int k = threadIdx.x; k < kB; k += kProductThreads) {
        copy_async<kPieceBytes>(scale2 + 4 * k, b.channels + 2 * kC + 4 * k, true);
    }
    constexpr int kPartSteps = kSteps1 / kParts;
    if constexpr (kNear1) start_weights<kB, kSteps1, kPartSteps>(near1, b.weights[0]);
    using Weights1 = ProductWeights<Products, Layout1, kSteps1, kNear1>;
    Weights1 weights1(kNear1 ? near1 : b.weights[0], 0, kPartSteps);

    const int64 tiles = (active < b.rows ? active : b.rows) * b.tiles;
    const bool exists = tile.exist(b);  // else there are no coordinates, which might leave 32 bits
    const Span y = span_of(b.height, exists ? tile.block_h : 0, tile.down, kTileH);
    const Span x = span_of(b.width, exists ? tile.block_w : 0, tile.right, kTileW);
    // One branch for all of it: the compiler puts a load off until the first branch that needs it.
    const bool is_listed = blockIdx.x < tiles;
    if (!(is_listed & exists & (y.size > 0) & (x.size > 0))) {
        if (is_listed && b.meeting != nullptr && threadIdx.x == 0) {
            arrive(b.meeting);
            leave(b, tiles);
        }
        return;
    }
    const int top = y.first - static_cast<int>(b.height.pad), left = x.first - static_cast<int>(b.width.pad);
    const Window window = window_of<kHaloH, kHaloW>(b, tile, top, left);

    constexpr int kMost = kMostBytes * kParts / WindowRows::kBytes;
    constexpr int kAtOnce = kMost < 1 ? 1 : kMost < kParts ? kMost : kParts;
    const auto start_part = [&](int part) {
        const T* const source = static_cast<const T*>(b.source);
        if (kNear1 && part > 0) start_weights<kB, kSteps1, kPartSteps>(near1, b.weights[0], part);
        Staged::part(window_pixels, part).start_rows(window, source + part * (kC / kParts));
        commit_async();
        if (part < kParts - 1) return;
        // After the window, which is needed first.
        if constexpr (kNear2) start_weights<kB, kSteps2>(near2, b.weights[1]);
        if constexpr (kNear3) start_weights<kC, kSteps3>(near3, b.weights[2]);
        commit_async();
    };
#pragma unroll
    for (int part = 0; part < kAtOnce; ++part) start_part(part);

    using Weights2 = ProductWeights<Products, Layout2, kSteps2, kNear2>;
    using Products3 = typename Products::InWords;
    using Weights3 = ProductWeights<Products3, Layout3, kSteps3, kNear3>;
    Sums<Layout1::kM, Layout1::kN> sums1;
    const Layout1 layout1;
    const Activated activated(norms, b.activates != 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        if (part > 0) weights1 = Weights1(near1, part * kPartSteps, kPartSteps);
        wait_async_groups_but(part + kAtOnce < kParts ? kAtOnce - 1 : kParts - part);
        __syncthreads();
        // To count takes some hundred clocks, for what came before it: the last warp is the one that may have no rows.
        if (part == kParts - 1 && b.meeting != nullptr && threadIdx.x == kProductThreads - kWarp) arrive(b.meeting);
        if (layout1.row < WindowRows::kPixels) {
            product<kCtas>(
                sums1, window_pixels, [](int m) { return WindowRows::offset(m < WindowRows::kPixels ? m : 0); },
                offsets1, zeros, weights1, activated);
        }
        if (part + kAtOnce < kParts) start_part(part + kAtOnce);
    }
    Weights2 weights2(kNear2 ? near2 : b.weights[1]);  // on their way while sums are activated; so are the third ones
    activate_sums<Products, HaloRows>(middle, exchanged, layout1, sums1, scale2, shift2, [&](int pixel) {
        return window.contains(pixel / kHaloW, pixel % kHaloW);
    });
    if constexpr (kNear2 || kNear3) wait_async_groups<0>();
    __syncthreads();

    Sums<Layout2::kM, Layout2::kN> sums2;
    product<kCtas>(
        sums2, middle, [](int m) { return m < TileRows::kPixels ? HaloRows::offset(m / kTileW, m % kTileW) : 0; },
        offsets2, zeros, weights2);
    Weights3 weights3(kNear3 ? near3 : b.weights[2]);
    if (Layout2::kDepth == 1) __syncthreads();  // else there is a barrier before parts are added
    activate_sums<Products, TileRows>(middle, exchanged, Layout2(), sums2, scale3, shift3, [](int) { return true; });
    let_later_kernels_start();  // earlier, they would take room from this one's own CTAs
    __syncthreads();

    T* const target = target_of<T>(b, tile, y, x);
    const WarpResults<T, Layout3, WindowRows, kTileH, kTileW> results(
        window_pixels + WindowRows::offset(y.first - top, x.first - left), y.size, x.size,
        static_cast<int>(b.target_strides[1]), static_cast<int>(b.target_strides[2]));
    bool may = may_write(b, tiles);
    for (int pass = 0; pass < kC; pass += Layout3::kAllColumns) {
        Sums<Layout3::kM, Layout3::kN> sums;
        product<kCtas>(
            sums, middle, [](int m) { return TileRows::offset(m < TileRows::kPixels ? m : 0); }, offsets3, zeros,
            weights3);
        if constexpr (kC > Layout3::kAllColumns) {
            const int following = (pass + Layout3::kAllColumns) % kC / kColumns * weights3.kStride;
            weights3 = Weights3((kNear3 ? near3 : b.weights[2]) + following);
        }
        const auto pieces = results.add(sums, pass);
        if (b.meeting != nullptr && pass == 0) {
            while (!may) may = have_met(b.meeting, static_cast<unsigned int>(tiles));
            __syncthreads();
        }
        results.write(target, pieces, pass);
    }
    if (b.meeting != nullptr && threadIdx.x == 0) leave(b, tiles);
}

}  // namespace sbnet
