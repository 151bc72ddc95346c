// The bottleneck of bottleneck.cu by warpgroups, for Hopper: its tensor cores read all matrices from shared memory, where
// its copy engine puts the weights. Tiles are squares of 8 x 8 pixels. The window is activated on its way to shared
// memory, through registers, which keep the tile's own pixels as they came until there is room for them, for the sum at
// the end.
//
// In place, CTAs meet as they do there.
#include "bottleneck.cuh"
#include "warpgroup.cuh"

namespace sbnet {

// How the warpgroups of a CTA share the first product, of all pixels of a window: kM times 64 in a row for each, as a
// square of an image that is kSide pixels wide. Pixels behind the last one are read, and left out later.
template <int kPixels, int kN_>
struct PixelGroups {
    static constexpr int kRowsM = kSide * kSide;
    static constexpr int kM = (kPixels + kGroups * kRowsM - 1) / (kGroups * kRowsM), kN = kN_;
    static constexpr int kDepth = 1, kThreadRows = 2, kAllColumns = kN * kColumns, kAllRows = kGroups * kM * kRowsM;

    int square, column = 0, depth = 0;

    __device__ PixelGroups() : square(group_number() * kM) {}
    __device__ int top(int m) const { return (square + m) * kSide; }
    __device__ int left(int) const { return 0; }

    // Pixel of row r of the calling thread's sums; negative if there is none.
    __device__ int pixel(int m, int r) const {
        const int row = (square + m) * kRowsM + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 +
                        static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * r;
        return row < kPixels ? row : -1;
    }
};

// Planes as such an image.
template <typename Planes>
struct PixelLine {
    static constexpr int kPlane = Planes::kPlane, kW = kSide;
};

// What it is made for: channels of the image and between the convolutions, the second one's kernel, how warpgroups share
// the last two products, and the orders of features of both kinds of channels.
template <typename T, int kC_, int kB_, int kKernelH, int kKernelW, typename Layout2_, typename Layout3_, int kTogetherB_,
          int kTogetherC_>
struct WgmmaBottleneck {
    using Layout2 = Layout2_;
    using Layout3 = Layout3_;
    static constexpr int kC = kC_, kB = kB_, kTogetherB = kTogetherB_, kTogetherC = kTogetherC_;
    static constexpr int kTileH = Layout2::kTileH, kTileW = Layout2::kTileW;
    static constexpr int kHaloH = kTileH + kKernelH - 1, kHaloW = kTileW + kKernelW - 1;
    static constexpr int kPiecesC = kC / kPiece<T>, kPiecesB = kB / kPiece<T>;
    using Layout1 = PixelGroups<kHaloH * kHaloW, kB / kColumns>;
    using WindowPlanes = PixelPlanes<kPiecesC, kHaloH, kHaloW>;
    using MiddlePlanes = PixelPlanes<kPiecesB, kHaloH, kHaloW>;
    using TilePlanes = PixelPlanes<kPiecesB, kTileH, kTileW>;
    using Depth1 = PlaneDepth<kPiecesC, 1, 1, 1>;
    using Depth2 = PlaneDepth<kPiecesB, kKernelH, kKernelW, Layout2::kDepth>;
    using Depth3 = PlaneDepth<kPiecesB, 1, 1, 1>;
    // A thread's results of a pixel are so many neighbours, and those of 4 lanes follow each other.
    static constexpr int kTogether = Layout3::kN < kTogetherC ? Layout3::kN : kTogetherC, kRun = 2 * kTogether;
    using ShortcutPixels = SpacedPixels<kPiecesC, kTileH, kTileW, 4 * kRun * static_cast<int>(sizeof(T)) / kPieceBytes>;
    using Staged = SharedWindow<T, kPiecesC, WindowPlanes>;
    static_assert(kC % (2 * kPiece<T>) == 0 && kB % kColumns == 0, "a product takes two pieces, and whole columns");
    static_assert(Layout2::kAllColumns == kB && kC % Layout3::kAllColumns == 0, "products are whole");
    static_assert(Layout3::kTileH == kTileH && Layout3::kTileW == kTileW && Layout3::kDepth == 1, "of the same tile");
    static_assert(Layout3::kN % kTogether == 0 && kTogetherC % kTogether == 0, "runs of features do not overlap");

    // Bytes of shared memory. In the place of the window and of the first weights comes what is needed later.
    static constexpr int kGates = 32, kNorms = 4 * kB * 4;
    static constexpr int kWeights1 = Depth1::kWeightRows * kB * kPieceBytes;
    static constexpr int kWeights2 = Depth2::kWeightRows * kB * kPieceBytes;
    static constexpr int kWeights3 = Depth3::kWeightRows * kC * kPieceBytes;
    static constexpr int kMiddle = MiddlePlanes::kBytes + (Depth2::kIsOdd ? MiddlePlanes::kPieceStep : 0);
    static constexpr int kTile = TilePlanes::kBytes + (Depth3::kIsOdd ? TilePlanes::kPieceStep : 0);
    static constexpr int kExchange = Layout2::kDepth == 1 ? 0 : Layout2::kM * Layout2::kN * 8 * kProductThreads;
    static constexpr int kLater = kWeights3 + kTile + kExchange + ShortcutPixels::kBytes;
    static constexpr int kFirst = WindowPlanes::kBytes + kWeights1 > kLater ? WindowPlanes::kBytes + kWeights1 : kLater;
    static constexpr int kBytes = kGates + kNorms + kFirst + kWeights2 + kMiddle;
    static_assert((Layout1::kAllRows - Layout1::kAllRows / 2) * kPieceBytes <= kWeights1 + kWeights2 + kMiddle,
                  "what is read behind the window is shared memory");
};

// Clears the plane behind the last one, which goes with it where they are odd.
template <typename Planes>
__device__ inline void clear_plane_behind(unsigned char* planes) {
    for (int k = threadIdx.x; k < Planes::kPlane; k += kProductThreads) {
        store(planes + Planes::kBytes + k * kPieceBytes, 0, Vec<int, 4>{});
    }
}

// The step between two convolutions, from the sums of one to the planes of the next. `pixel_of(m, r)` is negative where
// there is none; `is_inside` tells which pixels the dense network has, which pads with zeros.
template <typename T, typename Planes, int kTogether, typename Layout, typename PixelOf, typename IsInside>
__device__ inline void activate_group(unsigned char* planes, const GroupSums<Layout>& sums, const Layout& layout,
                                      const float* scale, const float* shift, const PixelOf& pixel_of,
                                      const IsInside& is_inside) {
    constexpr int kLanes = kPiece<T>;
    const int lane_column = layout.column + static_cast<int>(threadIdx.x) % 4 * 2;
    Vec<float, 2> scales[Layout::kN], shifts[Layout::kN];
    int places[Layout::kN];
#pragma unroll
    for (int n = 0; n < Layout::kN; ++n) {
        const int feature = FeatureOrder<kTogether>::feature_of(lane_column + n * kColumns);
        scales[n] = load_lanes<float, 2>(scale, feature);
        shifts[n] = load_lanes<float, 2>(shift, feature);
        places[n] = feature / kLanes * Planes::kPieceStep + feature % kLanes * static_cast<int>(sizeof(T));
    }
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
        for (int r = 0; r < Layout::kThreadRows; ++r) {
            const int pixel = pixel_of(m, r);
            if (pixel < 0) continue;
            const bool inside = is_inside(pixel);
#pragma unroll
            for (int n = 0; n < Layout::kN; ++n) {
                float number[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float y = fma_exact(sums.at[m][n][2 * r + i], scales[n].lane[i], shifts[n].lane[i]);
                    number[i] = inside ? max_exact(y, 0.0f) : 0.0f;
                }
                store(planes + places[n] + Planes::offset(pixel), 0, rounded<T, true>(number));
            }
        }
    }
}

// Where a thread's results go: to some pixels of the target, with those of the shortcut added.
template <typename T, typename Shape>
struct GroupResults {
    using Layout = typename Shape::Layout3;
    static constexpr int kRun = Shape::kRun;

    const unsigned char* shortcut;  // of the tile, in shared memory
    T* target;
    int row_stride, column_stride, height, width;

    // Sums are of columns from `pass` on.
    __device__ void write(const GroupSums<Layout>& sums, const Layout& layout, int pass) const {
        const int lane_column = pass + layout.column + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int m = 0; m < Layout::kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int y = layout.y(m, r), x = layout.x(m);
                if (y >= height || x >= width) continue;
                const unsigned char* const from = shortcut + Shape::ShortcutPixels::offset(y, x);
                T* const to = target + y * row_stride + x * column_stride;
#pragma unroll
                for (int first = 0; first < Layout::kN; first += Shape::kTogether) {
                    const int feature = FeatureOrder<Shape::kTogetherC>::feature_of(lane_column + first * kColumns);
                    const auto added = load_lanes<T, kRun>(from, feature);
                    float number[kRun];
#pragma unroll
                    for (int i = 0; i < kRun; ++i) {
                        const float sum = sums.at[m][first + i / 2][2 * r + i % 2];
                        number[i] = sum + Addition<T>::begin(added.lane[i]);
                    }
                    store(to + feature, 0, rounded<T, false>(number));
                }
            }
        }
    }
};

// A CTA takes a tile.
// Registers: at most 255.
template <typename T, typename Shape>
__global__ void __launch_bounds__(kProductThreads, 1) bottleneck_wgmma(const Bottleneck b) {
    using Layout1 = typename Shape::Layout1;
    using Layout2 = typename Shape::Layout2;
    using Layout3 = typename Shape::Layout3;
    using Staged = typename Shape::Staged;
    constexpr int kC = Shape::kC, kB = Shape::kB, kHaloW = Shape::kHaloW;
    extern __shared__ StepWords bottleneck_wgmma_shared[];
    CopyGate* gates = reinterpret_cast<CopyGate*>(bottleneck_wgmma_shared);  // of the weights of each product
    float* scale2 = reinterpret_cast<float*>(bottleneck_wgmma_shared + Shape::kGates / kPieceBytes);
    float *shift2 = scale2 + kB, *scale3 = shift2 + kB, *shift3 = scale3 + kB;
    unsigned char* window_planes = reinterpret_cast<unsigned char*>(shift3 + kB);
    unsigned char* weights1 = window_planes + Shape::WindowPlanes::kBytes;
    unsigned char* weights2 = window_planes + Shape::kFirst;
    unsigned char* middle = weights2 + Shape::kWeights2;
    unsigned char* weights3 = window_planes;
    unsigned char* tile_planes = weights3 + Shape::kWeights3;
    unsigned char* exchanged = tile_planes + Shape::kTile;
    unsigned char* shortcut = exchanged + Shape::kExchange;

    assume(threadIdx.x < kProductThreads);
    const bool copies = threadIdx.x == 0;
    if (copies) {
#pragma unroll
        for (int k = 0; k < 3; ++k) make_gate(gates + k);
        show_to_warpgroups();
    }
    if constexpr (Shape::Depth2::kIsOdd) clear_plane_behind<typename Shape::MiddlePlanes>(middle);

    typename Staged::Offsets offsets;
    Staged::find_offsets(offsets, static_cast<int>(b.source_strides[1]), static_cast<int>(b.source_strides[2]));
    wait_for_earlier_kernels();

    const TileNumbers tile(b, blockIdx.x);
    const int64 active = *b.bin_counts;
    const int64 tiles = (active < b.rows ? active : b.rows) * b.tiles;
    const bool exists = tile.exist(b);  // else there are no coordinates, which might leave 32 bits
    const Span y = span_of(b.height, exists ? tile.block_h : 0, tile.down, Shape::kTileH);
    const Span x = span_of(b.width, exists ? tile.block_w : 0, tile.right, Shape::kTileW);
    const bool is_listed = blockIdx.x < tiles;
    if (!(is_listed & exists & (y.size > 0) & (x.size > 0))) {
        if (is_listed && b.meeting != nullptr && threadIdx.x == 0) {
            arrive(b.meeting);
            leave(b, tiles);
        }
        return;
    }
    const Staged staged{window_planes};
    typename Staged::Numbers numbers;
    const int pad_h = static_cast<int>(b.height.pad), pad_w = static_cast<int>(b.width.pad);
    const Window window = window_of<Shape::kHaloH, kHaloW>(b, tile, y.first - pad_h, x.first - pad_w);
    Staged::fetch_at(numbers, offsets, window, static_cast<const T*>(b.source), window.offset(pad_h, pad_w));
    if (copies) {
        expect_bytes(gates, Shape::kNorms + Shape::kWeights1);
        copy_through(gates, weights1, b.weights[0], Shape::kWeights1);
        copy_through(gates, scale2, b.channels + 2 * kC, Shape::kNorms);
    }
    const ChannelAffine<kPiece<T>> activated(b.channels, b.channels + kC, b.activates != 0, Staged::piece() * kPiece<T>);
    Staged::for_pixels([&](int turn, int pixel) {
        float number[kPiece<T>];
#pragma unroll
        for (int i = 0; i < kPiece<T>; ++i) number[i] = activated(Addition<T>::begin(numbers.at[turn].lane[i]), i);
        store(staged.place(pixel), 0, rounded<T, true>(number));
        // All of the window is asked for, and begins to come: the largest weights are not to be ahead of it.
        if (turn == 0 && copies) {
            expect_bytes(gates + 1, Shape::kWeights2);
            copy_through(gates + 1, weights2, b.weights[1], Shape::kWeights2);
        }
    });
    show_to_warpgroups();
    if (copies) wait_at(gates);
    __syncthreads();
    if (b.meeting != nullptr && threadIdx.x == kProductThreads - kWarp) arrive(b.meeting);

    {
        const Layout1 layout;
        GroupSums<Layout1> sums;
        using Planes = PixelLine<typename Shape::WindowPlanes>;
        begin_warpgroup_products();
        GroupProduct<T, Planes, typename Shape::Depth1, Layout1>(window_planes, weights1, layout)
            .template add<0, Shape::Depth1::kSteps>(sums, false);
        finish_warpgroup_products();
        sums.hold();
        activate_group<T, typename Shape::MiddlePlanes, Shape::kTogetherB>(
            middle, sums, layout, scale2, shift2, [&](int m, int r) { return layout.pixel(m, r); },
            [&](int pixel) { return window.contains(pixel / kHaloW, pixel % kHaloW); });
    }
    show_to_warpgroups();
    if (copies) wait_at(gates + 1);
    __syncthreads();
    if (copies) {
        expect_bytes(gates + 2, Shape::kWeights3);
        copy_through(gates + 2, weights3, b.weights[2], Shape::kWeights3);
    }
    if constexpr (Shape::Depth3::kIsOdd) clear_plane_behind<typename Shape::TilePlanes>(tile_planes);

    {
        const Layout2 layout;
        GroupSums<Layout2> sums;
        begin_warpgroup_products();
        GroupProduct<T, typename Shape::MiddlePlanes, typename Shape::Depth2, Layout2>(middle, weights2, layout)
            .template add<0, Shape::Depth2::kSteps>(sums, false);
        // Meanwhile, the tile's own pixels.
        Staged::for_pixels([&](int turn, int pixel) {
            const int y = pixel / kHaloW - pad_h, x = pixel % kHaloW - pad_w;
            if (!((static_cast<unsigned int>(y) < Shape::kTileH) & (static_cast<unsigned int>(x) < Shape::kTileW))) return;
            store(shortcut + Shape::ShortcutPixels::offset(y, x) + Staged::piece() * kPieceBytes, 0, numbers.at[turn]);
        });
        finish_warpgroup_products();
        sums.hold();
        sums.exchange(exchanged, layout);
        activate_group<T, typename Shape::TilePlanes, Shape::kTogetherB>(
            tile_planes, sums, layout, scale3, shift3,
            [&](int m, int r) { return layout.y(m, r) * Shape::kTileW + layout.x(m); }, [](int) { return true; });
    }
    show_to_warpgroups();
    if (copies) wait_at(gates + 2);
    let_later_kernels_start();  // earlier, they would take room from this one's own CTAs
    __syncthreads();

    bool may = may_write(b, tiles);
    const GroupResults<T, Shape> results{shortcut, target_of<T>(b, tile, y, x), static_cast<int>(b.target_strides[1]),
                                         static_cast<int>(b.target_strides[2]), y.size, x.size};
    const Layout3 layout;
#pragma unroll 1
    for (int pass = 0; pass < kC; pass += Layout3::kAllColumns) {
        GroupSums<Layout3> sums;
        begin_warpgroup_products();
        // Columns of a pass lie side by side in rows of all columns.
        GroupProduct<T, typename Shape::TilePlanes, typename Shape::Depth3, Layout3, kC>(
            tile_planes, weights3 + pass * kPieceBytes, layout)
            .template add<0, Shape::Depth3::kSteps>(sums, false);
        finish_warpgroup_products();
        sums.hold();
        if (b.meeting != nullptr && pass == 0) {
            while (!may) may = have_met(b.meeting, static_cast<unsigned int>(tiles));
            __syncthreads();
        }
        results.write(sums, layout, pass);
    }
    if (b.meeting != nullptr && threadIdx.x == 0) leave(b, tiles);
}

}  // namespace sbnet
