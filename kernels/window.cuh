// A window of pixels of a tensor, brought to shared memory for products to read, and activated there; and how warps
// share the sums of a product. All sizes are compile-time constants: these kernels run for a few microseconds, of which
// every division would take a part.
#pragma once

#include "products.cuh"

namespace sbnet {

// Threads of a CTA. 512 with half the registers were slower in all but one of 16 problems on an H200.
constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / kWarp;

// Pixels [top, bottom) x [left, right) of a window lie in the tensor. Strides are in numbers; within a window, offsets
// fit 32 bits: the host sees to that.
struct Window {
    int64 origin;  // offset of pixel (0, 0), also where that lies outside of the tensor
    int row_stride, column_stride, channel_stride;
    int top, bottom, left, right;

    // By all four comparisons: branches between them took small convolutions 0.1 us.
    __device__ bool contains(int y, int x) const { return (y >= top) & (y < bottom) & (x >= left) & (x < right); }
    __device__ int offset(int y, int x) const { return y * row_stride + x * column_stride; }
};

// How a list of blocks is read: as it is throughout a kernel, or perhaps while an earlier one writes it.
struct Plainly {
    __device__ int operator()(const int* address) const { return *address; }
};
struct Freshly {
    __device__ int operator()(const int* address) const { return load_fresh(address); }
};

// Which tile of which block a CTA takes; what is loaded is not looked at yet. Of a kernel's argument it takes the list of
// blocks and how they are cut.
struct TileNumbers {
    unsigned int row, down, right;
    unsigned int image, block_h, block_w;

    TileNumbers() = default;

    // `number` is less than a.rows * a.tiles.
    template <typename Argument, typename Load = Plainly>
    __device__ TileNumbers(const Argument& a, unsigned int number, Load load = Load()) : row(a.by_tiles(number)) {
        const unsigned int tile = number - row * static_cast<unsigned int>(a.tiles);
        down = a.by_tiles_w(tile);
        right = tile - down * static_cast<unsigned int>(a.tiles_w);
        const int* triple = a.indices + row * a.index_strides[0];
        image = load(triple);
        block_h = load(triple + a.index_strides[1]);
        block_w = load(triple + 2 * a.index_strides[1]);
    }

    template <typename Argument>
    __device__ bool exist(const Argument& a) const {
        return image < a.batch && block_h < a.height.count && block_w < a.width.count;
    }

    // Of the same number: whether its block is the same.
    __device__ bool operator==(const TileNumbers& other) const {
        return image == other.image && block_h == other.block_h && block_w == other.block_w;
    }
};

// The part of one axis of a tile, in pixels.
struct Span {
    int first;   // pixel of the output image; may lie outside of it
    int within;  // the same in its block
    int size;

    // Of the block from pixel `block` on.
    __device__ Span(int block, int64 block_size, int tile, int tile_size) {
        within = tile * tile_size;
        first = block + within;
        const int left = static_cast<int>(block_size) - within;
        size = left < tile_size ? left : tile_size;
    }
};

// Which part [begin, end) of `size` pixels from pixel `first` on lies in [0, extent).
__device__ inline void inside_of(int first, int size, int extent, int& begin, int& end) {
    begin = first < 0 ? -first : 0;
    end = extent - first < size ? extent - first : size;
}

// What products read of numbers: their type, or float32 rounded to TF32.
template <typename T, bool kRounds, int kLanes>
__device__ inline Vec<T, kLanes> rounded(const float (&number)[kLanes]) {
    Vec<T, kLanes> result;
    if constexpr (sizeof(T) == 2) {
        unsigned int* words = reinterpret_cast<unsigned int*>(&result);
#pragma unroll
        for (int i = 0; i < kLanes; i += 2) words[i / 2] = pack_halves(number[i], number[i + 1], T{});
    } else {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) result.lane[i] = kRounds ? round_tf32(number[i]) : number[i];
    }
    return result;
}

// The step max(x * scale + shift, 0), or without the maximum, for some channels. Rounded once: within the error bounds
// of products, though not what Affine gives, bit for bit.
template <int kLanes>
struct ChannelAffine {
    static constexpr int kAtOnce = kLanes < 4 ? kLanes : 4;

    Vec<float, kAtOnce> scale[kLanes / kAtOnce], shift[kLanes / kAtOnce];
    bool has_relu;

    // Arrays of a float for each channel.
    __device__ ChannelAffine(const float* scales, const float* shifts, bool relu, int channel) : has_relu(relu) {
#pragma unroll
        for (int i = 0; i < kLanes / kAtOnce; ++i) {
            scale[i] = load_lanes<float, kAtOnce>(scales, channel + i * kAtOnce);
            shift[i] = load_lanes<float, kAtOnce>(shifts, channel + i * kAtOnce);
        }
    }

    __device__ float operator()(float x, int i) const {
        const float y = fma_exact(x, scale[i / kAtOnce].lane[i % kAtOnce], shift[i / kAtOnce].lane[i % kAtOnce]);
        return has_relu ? max_exact(y, 0.0f) : y;
    }
};

// A step max(x * scale + shift, 0), or without the maximum, of a matrix on its way into a product of kSteps steps, whose
// rows hold kPieces pieces of channels in order. What fills the last steps is zero and stays so.
template <typename T, int kPieces, int kSteps, bool kRounds>
struct ActivatedRows {
    static constexpr int kNumbers = 4 / static_cast<int>(sizeof(T));  // in a word
    static constexpr bool kWholeSteps = kPieces == kSteps * kStepPieces;
    static constexpr int kNorms = kPieces * 4;  // words of a row, and pairs of their scales and shifts

    // A word's scales, and then its shifts: a lane takes them at once.
    struct alignas(8 * kNumbers) Norm {
        float scale[kNumbers], shift[kNumbers];
    };
    const Norm* norms;  // in shared memory
    float least;        // 0, or what leaves all numbers as they are

    __device__ ActivatedRows(const float* norms, bool relu)
        : norms(reinterpret_cast<const Norm*>(norms)), least(relu ? 0.0f : -__int_as_float(0x7f800000)) {}

    // Starts to copy the norms of all channels from lists of their scales and, behind those, of their shifts.
    __device__ static void start(float* norms, const float* lists) {
        constexpr int kBytes = 4 * kNumbers;
#pragma unroll
        for (int begin = 0; begin < 2 * kNorms; begin += kProductThreads) {
            const int k = begin + static_cast<int>(threadIdx.x), word = k % kNorms, is_shift = k / kNorms;
            if (k >= 2 * kNorms) break;
            copy_async<kBytes>(norms + (2 * word + is_shift) * kNumbers, lists + k * kNumbers, true);
        }
    }

    struct Words {
        Norm norm[kStepPieces];
        float least;
        int pieces;  // that exist

        __device__ unsigned int operator()(unsigned int word, int piece) const {
            if (!kWholeSteps && piece >= pieces) return word;
            const auto number = *reinterpret_cast<const Vec<T, kNumbers>*>(&word);
            float result[kNumbers];
#pragma unroll
            for (int i = 0; i < kNumbers; ++i) {
                const float x = Addition<T>::begin(number.lane[i]);
                result[i] = max_exact(fma_exact(x, norm[piece].scale[i], norm[piece].shift[i]), least);
            }
            const auto whole = rounded<T, kRounds>(result);
            return *reinterpret_cast<const unsigned int*>(&whole);
        }
    };

    __device__ Words at(int step, int word) const {
        Words words;
        words.least = least;
        words.pieces = kPieces - step * kStepPieces;
#pragma unroll
        for (int piece = 0; piece < kStepPieces; ++piece) {
            if (!kWholeSteps && piece >= words.pieces) continue;
            words.norm[piece] = norms[(step * kStepPieces + piece) * 4 + word];
        }
        return words;
    }
};

// Scales and shifts of `room` channels from `first` on, to shared memory. Null stands for ones, or zeros; so do
// channels from `channels` on.
__device__ inline void share_channels(float* scales, float* shifts, int room, const float* scale, const float* shift,
                                      int first, int channels) {
    for (int k = threadIdx.x; k < room; k += kProductThreads) {
        const bool exists = first + k < channels;
        scales[k] = scale != nullptr && exists ? load_constant(scale + first + k) : 1.0f;
        shifts[k] = shift != nullptr && exists ? load_constant(shift + first + k) : 0.0f;
    }
}

// Pieces from a row of `width` pixels, which are `pitch` pieces apart, to the next. A product reads a piece of 8
// neighbouring pixels of a tile at once, and the banks hold 8 pieces: where such pixels lie in several rows, each row has
// to go on, counted around the banks, where the tile's row before ended. On an H200, convolutions in tiles whose width is
// no multiple of 8 took 0.97 of the time then, and down to 0.71.
constexpr int row_pieces(int pitch, int width, int tile_width, int stride_h, int stride_w) {
    if (tile_width % 8 == 0) return width * pitch;
    for (int pieces = width * pitch; pieces < width * pitch + 8; ++pieces) {
        if ((stride_h * pieces - tile_width * stride_w * pitch) % 8 == 0) return pieces;
    }
    return width * pitch;  // no such row: even strides
}

// How kHeight x kWidth pixels of kPieces pieces lie in shared memory, for products of tiles that are kTileW pixels wide:
// an odd number of pieces apart, so that neighbours meet different banks.
template <int kPieces, int kHeight, int kWidth, int kTileW = kWidth, int kStrideH = 1, int kStrideW = 1>
struct PixelRows {
    static constexpr int kW = kWidth, kPixels = kHeight * kWidth;
    static constexpr int kPieceStep = kPieceBytes;  // from a piece of a pixel to the next
    static constexpr int kPitch = (kPieces | 1) * kPieceBytes;
    static constexpr int kRow = row_pieces(kPieces | 1, kWidth, kTileW, kStrideH, kStrideW) * kPieceBytes;
    static constexpr int kBytes = kHeight * kRow;

    __device__ static int offset(int y, int x) { return y * kRow + x * kPitch; }
    __device__ static int offset(int pixel) {
        return kRow == kWidth * kPitch ? pixel * kPitch : offset(pixel / kWidth, pixel % kWidth);
    }
};

// A product's depth in the order of its packed weights (see _packing.py): chunk after chunk of kChunk pieces of a pixel,
// and in it the pieces of each pixel under the kernel. Chunks are filled up to whole steps, the last one to kChunk.
template <int kPieces_, int kChunk_, int kKernelH = 1, int kKernelW_ = 1>
struct Depth {
    static constexpr int kPieces = kPieces_, kChunk = kChunk_, kKernelW = kKernelW_;
    static constexpr int kPositions = kKernelH * kKernelW;
    static constexpr int kChunkSteps = (kPositions * kChunk + kStepPieces - 1) / kStepPieces;
    static constexpr int kSteps = (kPieces + kChunk - 1) / kChunk * kChunkSteps;
    static constexpr bool kInOrder = kSteps * kStepPieces == kPieces;  // of one pixel, and nothing is filled up
};

// Where the pieces of a row of such an implicit matrix lie. kOneChunk, for a depth of one chunk, divides less and is
// unrolled. It is for the convolution alone: the loop decides in which order the compiler puts all that follows in a
// kernel, and bottlenecks, which have three lists, would take up to two registers more.
template <typename Rows, typename Depth, bool kOneChunk = false>
__device__ inline void list_pieces(int* offsets) {
    static_assert(!kOneChunk || Depth::kSteps == Depth::kChunkSteps, "there is one chunk");
    constexpr int kRoom = Depth::kChunkSteps * kStepPieces;
    constexpr int kUnroll = kOneChunk ? 4 : 1;
#pragma unroll kUnroll
    for (int k = threadIdx.x; k < Depth::kSteps * kStepPieces; k += kProductThreads) {
        const int chunk = kOneChunk ? 0 : k / kRoom, within = kOneChunk ? k : k % kRoom;
        const int position = within / Depth::kChunk;
        const int piece = chunk * Depth::kChunk + within % Depth::kChunk;
        const int dy = position / Depth::kKernelW, dx = position % Depth::kKernelW;
        const bool exists = position < Depth::kPositions && piece < Depth::kPieces;
        offsets[k] = exists ? Rows::offset(dy, dx) + piece * kPieceBytes : kNoPiece;
    }
}

// What a product reads of such a list, which is written where it is needed.
template <typename Rows, typename Depth>
__device__ inline auto pieces_of(int* offsets) {
    if constexpr (Depth::kInOrder) {
        return PiecesInOrder();
    } else {
        list_pieces<Rows, Depth>(offsets);
        return static_cast<const int*>(offsets);
    }
}

// kPieces pieces of each pixel in shared memory. A thread takes one piece of every kStep-th pixel, so that it keeps what
// belongs to its channels in registers; neighbouring threads take neighbouring pieces.
template <typename T, int kPieces, typename Rows>
struct SharedWindow {
    static_assert(kPieces <= kProductThreads, "a thread takes one piece of a pixel");
    static constexpr int kPixels = Rows::kPixels, kWidth = Rows::kW;
    static constexpr int kStep = kProductThreads / kPieces;
    static constexpr int kTurns = (kPixels + kStep - 1) / kStep;
    static constexpr int kUnroll = kTurns < 8 ? kTurns : 8;

    unsigned char* pixels;

    // The pieces number `number` * kPieces and following of all pixels.
    __device__ static SharedWindow part(unsigned char* all_pixels, int number) {
        return {all_pixels + number * kPieces * Rows::kPieceStep};
    }

    __device__ static int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
    // Of the thread, at a turn; kPixels or more where it has nothing to do.
    __device__ static int pixel(int turn) {
        const int first = static_cast<int>(threadIdx.x) / kPieces;
        return first < kStep ? first + turn * kStep : kPixels;
    }
    __device__ unsigned char* place(int of_pixel) const {
        return pixels + Rows::offset(of_pixel) + piece() * Rows::kPieceStep;
    }

    // Starts to copy a thread's pieces of channels from `channel` on, and zeros for what lies outside of the tensor or
    // beyond `channels`. kWhole tells that pieces are pieces in memory too: aligned to 16 bytes, channels side by side,
    // the last piece full.
    template <bool kWhole>
    __device__ void start(const Window& window, const T* tensor, int channel, int channels) const {
        const int begin = channel + piece() * kPiece<T>;
        const bool exists = begin < channels;
        const T* source = tensor + window.origin + (kWhole ? begin : begin * window.channel_stride);
#pragma unroll kUnroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int at = pixel(turn), y = at / kWidth, x = at % kWidth;
            const bool inside = exists & window.contains(y, x);
            const T* from = source + window.offset(y, x);
            hold(from);  // else there is a branch around each copy, to spare some threads this
            if (at >= kPixels) continue;
            if constexpr (kWhole) {
                copy_async<kPieceBytes>(place(at), from, inside);
            } else {
                Vec<T, kPiece<T>> numbers{};
                for (int i = 0; i < kPiece<T>; ++i) {
                    if (inside && begin + i < channels) numbers.lane[i] = from[i * window.channel_stride];
                }
                store(place(at), 0, numbers);
            }
        }
    }

    // The same for whole pieces of float32 that are rounded on their way: through registers. They are asked for here.
    struct Numbers {
        Vec<T, kPiece<T>> at[kTurns];
    };
    __device__ void fetch(Numbers& numbers, const Window& window, const T* tensor, int channel, int channels) const {
        const int begin = channel + piece() * kPiece<T>;
        const T* source = tensor + window.origin + begin;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int at = pixel(turn), y = at / kWidth, x = at % kWidth;
            const bool inside = (at < kPixels) & (begin < channels) & window.contains(y, x);
            uint4 bits{};
            if (inside) bits = load_fresh(word_at<uint4>(source + window.offset(y, x), 0));
            store(&numbers.at[turn], 0, bits);
        }
    }

    // The same in two steps, for a tensor whose pixels outside are of no interest: what does not depend on where the window
    // lies comes first, and no load waits for a condition.
    struct Offsets {
        int at[kTurns];
    };
    __device__ static void find_offsets(Offsets& offsets, int row_stride, int column_stride) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int at = pixel(turn) < kPixels ? pixel(turn) : kPixels - 1;
            offsets.at[turn] = at / kWidth * row_stride + at % kWidth * column_stride + piece() * kPiece<T>;
            hold(offsets.at[turn]);
        }
    }
    // In place of pixels outside come those at offset `other`.
    __device__ static void fetch_at(Numbers& numbers, const Offsets& offsets, const Window& window, const T* tensor,
                                    int other) {
        const T* const source = tensor + window.origin;
        if (window.contains(0, 0) && window.contains(kPixels / kWidth - 1, kWidth - 1)) {
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) {
                numbers.at[turn] = load<Vec<T, kPiece<T>>>(source + offsets.at[turn], 0);
            }
        } else {
            other += piece() * kPiece<T>;
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) {
                const bool inside = window.contains(pixel(turn) / kWidth, pixel(turn) % kWidth);
                numbers.at[turn] = load<Vec<T, kPiece<T>>>(source + (inside ? offsets.at[turn] : other), 0);
            }
        }
    }

    // Calls visit(turn, pixel) for each pixel of the thread, with no more branches than it takes.
    template <typename Visit>
    __device__ static void for_pixels(const Visit& visit) {
        const int first = static_cast<int>(threadIdx.x) / kPieces;
        if (first >= kStep) return;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int at = first + turn * kStep;
            if ((turn + 1) * kStep <= kPixels || at < kPixels) visit(turn, at);
        }
    }

    // Rounded to TF32.
    __device__ void put(const Numbers& numbers) const {
        for_pixels([&](int turn, int pixel) {
            auto rounded = numbers.at[turn];
#pragma unroll
            for (int i = 0; i < kPiece<T>; ++i) rounded.lane[i] = round_tf32(rounded.lane[i]);
            store(place(pixel), 0, rounded);
        });
    }

    // Turns of the threads that copy so many rows of a window at once.
    static constexpr int turns_of(int rows) {
        return (kPixels / kWidth + rows - 1) / rows *
               ((rows * kWidth * kPieces + kProductThreads - 1) / kProductThreads);
    }
    static constexpr int best_rows() {
        int best = 1;
        for (int rows = 2; rows <= 4; ++rows) {
            if (turns_of(rows) < turns_of(best)) best = rows;
        }
        return best;
    }

    // The same for whole pieces that all exist: some rows of the window at once, so that a thread finds its places in a
    // row once. Through the L1 cache: around it, bottlenecks on an H100 took up to 0.6 us more.
    __device__ void start_rows(const Window& window, const T* tensor) const {
        constexpr int kAtOnce = best_rows(), kItems = kAtOnce * kWidth * kPieces, kHeight = kPixels / kWidth;
#pragma unroll
        for (int begin = 0; begin < kItems; begin += kProductThreads) {
            const int item = begin + static_cast<int>(threadIdx.x);
            if (begin + kProductThreads > kItems && item >= kItems) break;
            const int row = item / (kWidth * kPieces), x = item / kPieces % kWidth, of_pixel = item % kPieces;
            const bool inside = x >= window.left && x < window.right;
            const T* from = tensor + (window.origin + window.offset(row, x) + of_pixel * kPiece<T>);
            unsigned char* to = pixels + Rows::offset(row, x) + of_pixel * Rows::kPieceStep;
#pragma unroll
            for (int first = 0; first < kHeight; first += kAtOnce) {
                const int y = first + row;
                if (first + kAtOnce > kHeight && y >= kHeight) break;
                copy_async<kPieceBytes, true>(to + first * Rows::kRow, from,
                                              inside && y >= window.top && y < window.bottom);
                from += kAtOnce * window.row_stride;
            }
        }
    }

    // After the copies of this thread are there: the step in all pixels of the tensor; what is zero outside of it stays.
    template <bool kRounds>
    __device__ void activate(const Window& window, const ChannelAffine<kPiece<T>>& affine) const {
        // Some at a time, loaded before the first is stored: about as many in each batch.
        constexpr int kBatches = (kTurns + 5) / 6, kBatch = (kTurns + kBatches - 1) / kBatches;
#pragma unroll 1
        for (int first = 0; first < kTurns; first += kBatch) {
            Vec<T, kPiece<T>> numbers[kBatch];
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const int at = pixel(first + u);
                numbers[u] = Vec<T, kPiece<T>>{};
                if (at < kPixels) numbers[u] = load<Vec<T, kPiece<T>>>(place(at), 0);
            }
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const int at = pixel(first + u);
                if (at >= kPixels || !window.contains(at / kWidth, at % kWidth)) continue;
                float number[kPiece<T>];
#pragma unroll
                for (int i = 0; i < kPiece<T>; ++i) number[i] = affine(Addition<T>::begin(numbers[u].lane[i]), i);
                store(place(at), 0, rounded<T, kRounds>(number));
            }
        }
    }
};

// How the warps of a CTA share the sums of a product: each takes kM x kN tiles of 16 x 8, and those that differ in
// `depth` only, parts of the sums of the same.
template <int kM_, int kN_, int kWarpsM, int kWarpsN>
struct Warps {
    static constexpr int kM = kM_, kN = kN_, kTiles = kM * kN;
    static constexpr int kWide = kWarpsM * kWarpsN;  // warps of one depth
    static constexpr int kDepth = kProductWarps / kWide;
    static_assert(kDepth * kWide == kProductWarps, "all warps have a share");
    static constexpr int kAllRows = kWarpsM * kM * kRows, kAllColumns = kWarpsN * kN * kColumns;
    // Shared memory through which depths exchange their parts.
    static constexpr int kExchanged = kDepth == 1 ? 0 : kProductWarps * kTiles * kWarp * 16;

    int row, column;  // first ones of the calling warp
    int depth, wide;

    __device__ Warps() {
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        wide = warp % kWide;
        depth = kDepth == 1 ? 0 : warp / kWide;  // which the compiler cannot know
        row = wide % kWarpsM * kM * kRows;
        column = wide / kWarpsM * kN * kColumns;
    }

    // The warp's share of `steps`.
    __device__ int begin(int steps) const { return steps * depth / kDepth; }
    __device__ int end(int steps) const { return steps * (depth + 1) / kDepth; }

    // Calls `finish(pixels, n, sums, brought)` for all tiles (m, n) of 16 x 8 sums. By the only warp that has them: for
    // the kN tiles of a row at once. Or, after the parts of all depths are added: for each alone, by the warp of depth
    // (m * kN + n) % kDepth. Parts are added in order, so that every run gives the same bits. `pixels` is what
    // `pixels_of(m)` returns, and what `bring(pixels, n)` returns is brought from memory ahead: for a row of tiles, or
    // for the next one while the parts of another are added. All threads call it; nobody may be reading `shared`.
    template <typename PixelsOf, typename Bring, typename Finish>
    __device__ void finish(unsigned char* shared, const Sums<kM, kN>& sums, PixelsOf pixels_of, Bring bring,
                           Finish finish) const {
        using Brought = decltype(bring(pixels_of(0), 0));
        if constexpr (kDepth == 1) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                const auto pixels = pixels_of(m);
                Brought brought[kN];
#pragma unroll
                for (int n = 0; n < kN; ++n) brought[n] = bring(pixels, n);
                finish(pixels, 0, sums.at[m], brought);
            }
        } else {
            using Part = Vec<float, 4>;
            const int lane = threadIdx.x % kWarp;
            Part* parts = reinterpret_cast<Part*>(shared) + wide * kTiles * kWarp + lane;
            constexpr int kStride = kWide * kTiles * kWarp;  // from depth to depth
            Brought next{};
            if (depth < kTiles) next = bring(pixels_of(depth / kN), depth % kN);
#pragma unroll
            for (int k = 0; k < kTiles; ++k) {
                const float(&sum)[4] = sums.at[k / kN][k % kN];
                parts[depth * kStride + k * kWarp] = Part{{sum[0], sum[1], sum[2], sum[3]}};
            }
            __syncthreads();
            for (int k = depth; k < kTiles; k += kDepth) {
                const Brought brought[1] = {next};
                if (k + kDepth < kTiles) next = bring(pixels_of((k + kDepth) / kN), (k + kDepth) % kN);
                Part part[kDepth];
#pragma unroll
                for (int d = 0; d < kDepth; ++d) part[d] = parts[d * kStride + k * kWarp];
                float total[1][4] = {};
#pragma unroll
                for (int d = 0; d < kDepth; ++d) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[0][i] += part[d].lane[i];
                }
                finish(pixels_of(k / kN), k % kN, total, brought);
            }
        }
    }

    // Tiles of sums that a warp has once parts are added, as `finish` shares them out: in turn k, that of number
    // total_tile(k), if there is one.
    static constexpr int kTotals = (kTiles + kDepth - 1) / kDepth;
    __device__ int total_tile(int turn) const { return turn * kDepth + depth; }
    __device__ bool has_total(int turn) const { return kTiles % kDepth == 0 || total_tile(turn) < kTiles; }

    // All of them, in registers. All threads call it; nobody may be reading `shared`.
    __device__ void add_parts(unsigned char* shared, const Sums<kM, kN>& sums, float (&totals)[kTotals][4]) const {
        using Part = Vec<float, 4>;
        Part* parts = reinterpret_cast<Part*>(shared) + wide * kTiles * kWarp + static_cast<int>(threadIdx.x) % kWarp;
        constexpr int kStride = kWide * kTiles * kWarp;  // from depth to depth
        if constexpr (kDepth > 1) {
#pragma unroll
            for (int k = 0; k < kTiles; ++k) {
                const float(&sum)[4] = sums.at[k / kN][k % kN];
                parts[depth * kStride + k * kWarp] = Part{{sum[0], sum[1], sum[2], sum[3]}};
            }
            __syncthreads();
        }
#pragma unroll
        for (int turn = 0; turn < kTotals; ++turn) {
#pragma unroll
            for (int i = 0; i < 4; ++i) totals[turn][i] = kDepth == 1 ? sums.at[turn / kN][turn % kN][i] : 0.0f;
            if (kDepth == 1 || !has_total(turn)) continue;
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
                const Part part = parts[d * kStride + total_tile(turn) * kWarp];
#pragma unroll
                for (int i = 0; i < 4; ++i) totals[turn][i] += part.lane[i];
            }
        }
    }

    // Row of sums 2 * r and 2 * r + 1 of tile (m, n), and the first one's column.
    __device__ int row_of(int m, int r) const {
        return row + m * kRows + r * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
    }
    __device__ int column_of(int n) const { return column + n * kColumns + static_cast<int>(threadIdx.x) % 4 * 2; }
};

// Words of four neighbouring lanes change places: word i of lane t becomes word t of lane i. All lanes of a warp call
// it.
__device__ inline void transpose_words(unsigned int (&word)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            unsigned int& low = word[step == 1 ? 2 * k : k];
            unsigned int& high = word[step == 1 ? 2 * k + 1 : k + 2];
            const unsigned int got = __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
            (upper ? low : high) = got;
        }
    }
}

// The sums of a warp on their way out, pass after pass over the columns: added to the pixels of a window, and turned so
// that a lane has whole pieces of its rows, for memory takes those fastest. They are sums of Products::InWords.
// A pixel lies in row pixel / kTileW of the tile, whose pixels lie in the window as Rows tells.
template <typename T, typename Layout, typename Rows, int kTileH, int kTileW>
struct WarpResults {
    static constexpr int kM = Layout::kM, kN = Layout::kN;
    static constexpr int kNumbers = 4 / static_cast<int>(sizeof(T));  // in a word
    static constexpr int kWords = 2 / kNumbers;                       // that hold a lane's sums of a row of one tile
    static constexpr int kPieces = kN * kWords;                       // of a row; each four lanes have one word each
    static constexpr int kTurns = (kPieces + 3) / 4;                  // in which these lanes write four pieces
    using Word = Vec<T, kNumbers>;
    using Piece = Vec<unsigned int, 4>;
    struct Pieces {
        Piece at[kM][2][kTurns];
    };

    const unsigned char* shortcuts[kM][2];  // of a lane's first word of a row, in the first pass
    int targets[kM][2];                     // of its first piece
    bool exists[kM][2];

    // The tile begins at `tile`; its pixels [0, height) x [0, width) are written.
    __device__ WarpResults(const unsigned char* tile, int height, int width, int row_stride, int column_stride) {
        const Layout layout;
        const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int pixel = layout.row_of(m, r), dy = pixel / kTileW, dx = pixel % kTileW;
                exists[m][r] = dy < height && dx < width;
                // Any other pixel will do where there is none.
                shortcuts[m][r] = tile + (pixel < kTileH * kTileW ? Rows::offset(dy, dx) : 0) +
                                  (layout.column + t * kNumbers) * static_cast<int>(sizeof(T));
                targets[m][r] = dy * row_stride + dx * column_stride + layout.column + t * kPiece<T>;
            }
        }
    }

    // The results of the pass that begins with column `first`. Rounded once.
    __device__ Pieces add(const Sums<kM, kN>& sums, int first) const {
        Pieces pieces;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int turn = 0; turn < kTurns; ++turn) {
                    auto& piece = pieces.at[m][r][turn];
#pragma unroll
                    for (int i = 0; i < 4; ++i) piece.lane[i] = word(sums, m, r, turn * 4 + i, first);
                    transpose_words(piece.lane);
                }
            }
        }
        return pieces;
    }

    __device__ void write(T* target, const Pieces& pieces, int first) const {
        const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int turn = 0; turn < kTurns; ++turn) {
                    if (!exists[m][r] || turn * 4 + t >= kPieces) continue;
                    store(target + (targets[m][r] + first + turn * 4 * kPiece<T>), 0, pieces.at[m][r][turn]);
                }
            }
        }
    }

   private:
    // A lane's word of piece k of a row.
    __device__ unsigned int word(const Sums<kM, kN>& sums, int m, int r, int k, int first) const {
        if (k >= kPieces) return 0;
        const auto shortcut =
            load<Word>(shortcuts[m][r] + first * static_cast<int>(sizeof(T)), k * (kPieceBytes / 4));
        float number[kNumbers];
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) {
            number[i] = Addition<T>::begin(shortcut.lane[i]) + sums.at[m][k / kWords][2 * r + k % kWords + i];
        }
        const auto result = rounded<T, false>(number);
        return *reinterpret_cast<const unsigned int*>(&result);
    }
};

}  // namespace sbnet
