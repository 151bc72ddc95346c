// reduce_mask: block_activity pools every block of the grid into one bit, compact_active turns the bits into the
// ascending list of active blocks, and where they are very many, count_active counts them first. The block size is a
// run-time number here: it bounds loops that the image's borders cut short anyway, so knowing it would not change the
// code.
#include "pool.cuh"
#include "ptx.cuh"
#include "transfer.cuh"

namespace sbnet {

// Rows that a thread has in flight at once. The host gives a column so many threads that this takes in the whole of a
// usual block: 18 rows are 2 threads with 9 loads each. On an H200, 8 masks of 2048 x 2048 pixels took 43 us with 9, 47
// us with 6 and 44 us with 18.
constexpr int kPoolRows = 9;

constexpr int kCompactThreads = 256;

// One axis of the block grid. Pixels are counted in 64 bits, blocks in 32.
struct BlockAxis {
    int64 first, end;  // blocks that have pixels in the image: a part of the grid
    int64 start;       // pixel at which block `first` begins, if need be outside of the image
    int64 stride, size, extent;

    __device__ unsigned int first_block() const { return static_cast<unsigned int>(first); }
    __device__ unsigned int end_block() const { return static_cast<unsigned int>(end); }
    // Where a block that has pixels begins.
    __device__ int64 origin_of(unsigned int block) const { return start + (block - first_block()) * stride; }
};

// Argument of all kernels. Mirrored, field by field, by _pooling.py.
//
// The bits of a grid row are its words, each of `word_blocks` blocks from the lowest bit on, the last of a row perhaps
// of fewer. Blocks, and so words and grid rows of all images, are fewer than 2^31.
struct Reduction {
    const void* mask;        // [batch, height.extent, width.extent], strides in pixels
    unsigned int* words;     // [batch, blocks_h, row_words]: 1 for an active block
    int* tile_counts;        // [tiles]: active blocks of each tile; null where compact_active counts all words itself
    int* indices;            // [capacity, 3]
    int* bin_counts;         // [1]
    int* host_count;         // the same in the host's memory, or null
    unsigned int* arrivals;  // CTAs of block_activity that are done, 0 between launches; null if compact_active follows
    int64 mask_strides[3];
    BlockAxis height, width;
    Threshold threshold;
    int64 blocks_h;  // of the grid
    Divisor by_blocks_h;
    int64 blocks_w;
    int64 strips;  // CTAs that share a grid row
    Divisor by_strips;
    int64 strip;  // blocks that a CTA pools, at most one for each of its threads
    int64 row_words;  // words of a grid row
    Divisor by_row_words;
    int64 strip_words;  // words of a strip
    int64 word_blocks;  // blocks of a word: a strip, or kWarp where strips have several words
    int64 words_end;    // words of all grid rows
    int64 tile;         // words that one CTA compacts
    int64 tiles;
    int64 capacity;  // rows of indices
    int64 pad;       // not 0: rows from the count on become (-1, -1, -1)
};

// In-image pixels [begin, end) of a block along an axis; none for a block outside of the image.
__device__ inline void pixels_of(const BlockAxis& axis, unsigned int block, int64& begin, int64& end) {
    begin = end = 0;
    if (block < axis.first_block() || block >= axis.end_block()) return;
    const int64 origin = axis.origin_of(block);
    begin = origin < 0 ? 0 : origin;
    end = origin + axis.size < axis.extent ? origin + axis.size : axis.extent;
}

// The neighbouring blocks of one grid row that a CTA pools.
struct Strip {
    unsigned int first;   // block
    int count;            // blocks
    int skipped, inside;  // blocks left of the image, and those after them that have pixels in it
    int64 origin;         // column at which the first of these begins, if need be left of the image
    int64 left, right;    // in-image columns from the first to the last of them
};

__device__ inline Strip strip_at(const Reduction& r, unsigned int number) {
    const unsigned int blocks = static_cast<unsigned int>(r.strip), blocks_w = static_cast<unsigned int>(r.blocks_w);
    Strip s{number * blocks, 0, 0, 0, 0, 0, 0};
    s.count = static_cast<int>(blocks_w - s.first < blocks ? blocks_w - s.first : blocks);
    const unsigned int end = s.first + s.count;
    const unsigned int first_inside = s.first > r.width.first_block() ? s.first : r.width.first_block();
    const unsigned int end_inside = end < r.width.end_block() ? end : r.width.end_block();
    if (first_inside >= end_inside) return s;
    s.skipped = static_cast<int>(first_inside - s.first);
    s.inside = static_cast<int>(end_inside - first_inside);
    s.origin = r.width.origin_of(first_inside);
    s.left = s.origin < 0 ? 0 : s.origin;
    const int64 right = s.origin + (s.inside - 1) * r.width.stride + r.width.size;
    s.right = right < r.width.extent ? right : r.width.extent;
    return s;
}

// `width` columns of a strip from column `first` on. A strip of several blocks is a single piece, within which numbers
// of 32 bits will do.
struct Piece {
    int width;
    int used;        // columns, before the strip ends
    int begin, end;  // of the first block in the image, as far as they are not far away
    int skipped, inside, stride, size;

    __device__ Piece(const Reduction& r, const Strip& s, int64 first, int piece_width)
        : width(piece_width), skipped(s.skipped), inside(s.inside) {
        constexpr int64 kFar = 1 << 30;
        used = static_cast<int>(s.right - first < width ? s.right - first : width);
        begin = static_cast<int>(s.origin - first > -kFar ? s.origin - first : -kFar);
        end = static_cast<int>(s.origin + r.width.size - first < kFar ? s.origin + r.width.size - first : kFar);
        stride = static_cast<int>(r.width.stride);
        size = static_cast<int>(r.width.size);
    }

    // Does one of the kLanes columns from `x` on belong to a block?
    template <int kLanes>
    __device__ bool is_covered(int x) const {
        if (x >= used) return false;
        if (inside == 1 || stride <= size || x < begin) return true;
        const int phase = static_cast<unsigned int>(x - begin) % static_cast<unsigned int>(stride);
        return phase < size || phase + kLanes > stride;
    }

    // Columns [first, last) of a block of the strip; none where last <= first. No pixel is in those beyond the image.
    __device__ void span(int block, int& first, int& last) const {
        const int k = block - skipped;
        first = begin + k * stride;
        last = end + k * stride;
        first = first > 0 ? first : 0;
        last = last < width ? last : width;
    }
};

// Adds `height` rows of kLanes columns to their pools: the first, and then each blockDim.y further down. `offset` is
// that of the first.
template <typename T, int kLanes, typename Pool>
__device__ inline void pool_rows(const Reduction& r, int64 offset, int64 height, Pool (&column)[kLanes]) {
    const int distance = blockDim.y;
    const int64 step = distance * r.mask_strides[1];
#pragma unroll 1
    for (int64 rest = height; rest > 0; rest -= kPoolRows * distance) {
        const int rows = static_cast<int>(rest < kPoolRows * distance ? rest : kPoolRows * distance);
        Vec<T, kLanes> pixels[kPoolRows];
#pragma unroll
        for (int u = 0; u < kPoolRows; ++u) {
            if (u > 0) offset += u * distance < rows ? step : 0;  // else the same row again
            pixels[u] = load_lanes<T, kLanes>(r.mask, offset);
        }
        offset += step;
#pragma unroll
        for (int u = 0; u < kPoolRows; ++u) {
            const bool valid = u * distance < rows;
#pragma unroll
            for (int i = 0; i < kLanes; ++i) column[i].add(pixels[u].lane[i], r.threshold, valid);
        }
    }
}

// The pool of the thread's own block of a strip, over rows [top, bottom). First each thread reduces rows of kLanes
// neighbouring columns, which reads the mask in coalesced lines, and each pixel once however much blocks overlap
// sideways; then columns are collected into blocks. Only a block that is wider than the columns of a CTA takes more
// than one piece.
template <typename T, typename Pool, int kLanes>
__device__ inline Pool pool_strip(const Reduction& r, const Strip& s, int64 image, int64 top, int64 bottom) {
    __shared__ typename Pool::template Columns<kLanes> shared;
    const int piece_width = blockDim.x * kLanes;
    const int64 begin = s.left - (s.left & (kLanes - 1));
    const int x = threadIdx.x * kLanes, y = threadIdx.y;
    Pool mine = Pool::none();
#pragma unroll 1
    for (int64 first = begin; first < s.right; first += piece_width) {
        if (first != begin) __syncthreads();  // the last piece may still be read
        const Piece piece(r, s, first, piece_width);
        Pool column[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) column[i] = Pool::none();
        if (piece.is_covered<kLanes>(x)) {
            const int64 corner = image * r.mask_strides[0] + top * r.mask_strides[1] + first * r.mask_strides[2];
            pool_rows<T>(r, corner + y * r.mask_strides[1] + x * r.mask_strides[2], bottom - top - y, column);
        }
        shared.put(column);
        __syncthreads();
        shared.collect(s.count, piece, mine);
    }
    return mine;
}

// Lists the active blocks of words [first, last), the first of which goes to row `next_row`; returns the row behind the
// last.
__device__ inline int list_active(const Reduction& r, unsigned int first, unsigned int last, int next_row) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int lane = thread % kWarp;
    const int warps = blockDim.x * blockDim.y / kWarp;
#pragma unroll 1
    for (unsigned int chunk = first; chunk < last; chunk += kWarp) {
        // Each warp scans kWarp words, one a lane, and lists the blocks of some, one block a lane.
        const unsigned int word = chunk + lane < last ? r.words[chunk + lane] : 0;
        int through = __popc(word);
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, through, distance);
            if (lane >= distance) through += other;
        }
        const int words = last - chunk < kWarp ? static_cast<int>(last - chunk) : kWarp;
#pragma unroll 4
        for (int k = thread / kWarp; k < words; k += warps) {
            const unsigned int bits = __shfl_sync(0xffffffffu, word, k);
            const int row = next_row + __shfl_sync(0xffffffffu, through, k) - __popc(bits >> lane);
            if ((bits >> lane & 1) == 0 || row >= r.capacity) continue;
            const unsigned int line = r.by_row_words(chunk + k);
            const unsigned int image = r.by_blocks_h(line);
            const unsigned int column = (chunk + k - line * static_cast<unsigned int>(r.row_words)) *
                                        static_cast<unsigned int>(r.word_blocks) + lane;
            int* triple = r.indices + 3 * static_cast<int64>(row);
            triple[0] = static_cast<int>(image);
            triple[1] = static_cast<int>(line - image * static_cast<unsigned int>(r.blocks_h));
            triple[2] = static_cast<int>(column);
        }
        next_row += __shfl_sync(0xffffffffu, through, kWarp - 1);
    }
    return next_row;
}

__device__ inline void tell_count(const Reduction& r, int count) {
    *r.bin_counts = count;
    if (r.host_count != nullptr) *r.host_count = count;
}

// Is this the last CTA of the grid to get here? It then sees what all others wrote before.
__device__ inline bool arrives_last(unsigned int* arrivals) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// One CTA pools a strip of neighbouring blocks of one grid row. Where there is little to do, the last CTA to finish
// lists the active blocks, and no other kernel need be launched.
// Registers: at most 128.
template <typename T, template <typename> class PoolOf, int kLanes>
__global__ void __launch_bounds__(kPoolThreads, ctas_that_fit(PoolOf<T>::kCtas)) block_activity(const Reduction r) {
    const unsigned int grid_row = r.by_strips(blockIdx.x);
    const unsigned int image = r.by_blocks_h(grid_row);
    const unsigned int number = blockIdx.x - grid_row * static_cast<unsigned int>(r.strips);
    int64 top, bottom;
    pixels_of(r.height, grid_row - image * static_cast<unsigned int>(r.blocks_h), top, bottom);
    const Strip strip = strip_at(r, number);
    wait_for_earlier_kernels();
    let_later_kernels_start();

    const auto mine = pool_strip<T, PoolOf<T>, kLanes>(r, strip, image, top, bottom);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const bool active = thread < strip.count && mine.active(r.threshold);
    const unsigned int word = __ballot_sync(0xffffffffu, active);
    if (thread % kWarp == 0 && thread < strip.count) {
        r.words[grid_row * r.row_words + number * r.strip_words + thread / kWarp] = word;
    }

    if (r.arrivals == nullptr || !arrives_last(r.arrivals)) return;
    const int count = list_active(r, 0, static_cast<unsigned int>(r.words_end), 0);
    if (thread == 0) {
        tell_count(r, count);
        *r.arrivals = 0;
    }
}

// Sums over the CTA.
__device__ inline void sum_threads(int& a, int& b) {
    constexpr int kWarps = kCompactThreads / kWarp;
    __shared__ int sums[2][kWarps];
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, distance);
        b += __shfl_xor_sync(0xffffffffu, b, distance);
    }
    if (threadIdx.x % kWarp == 0) {
        sums[0][threadIdx.x / kWarp] = a;
        sums[1][threadIdx.x / kWarp] = b;
    }
    __syncthreads();
    a = b = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        a += sums[0][w];
        b += sums[1][w];
    }
}

// Counts the active blocks of each tile.
// Registers: at most 40.
__global__ void __launch_bounds__(kCompactThreads) count_active(const Reduction r) {
    wait_for_earlier_kernels();
    let_later_kernels_start();
    const int64 begin = blockIdx.x * r.tile;
    const int64 end = begin + r.tile < r.words_end ? begin + r.tile : r.words_end;
    int count = 0, unused = 0;
#pragma unroll 8
    for (int64 k = begin + threadIdx.x; k < end; k += kCompactThreads) count += __popc(r.words[k]);
    sum_threads(count, unused);
    if (threadIdx.x == 0) r.tile_counts[blockIdx.x] = count;
}

// Each CTA lists the active blocks of its tile, behind those of all tiles before it. It counts those itself: to read
// some thousand words once more takes less time than to wait for another kernel.
// Registers: at most 40.
__global__ void __launch_bounds__(kCompactThreads) compact_active(const Reduction r) {
    wait_for_earlier_kernels();
    let_later_kernels_start();
    const int64 begin = blockIdx.x * r.tile;
    const int64 end = begin + r.tile < r.words_end ? begin + r.tile : r.words_end;
    const int parts = static_cast<int>(r.tile_counts == nullptr ? r.words_end : r.tiles);
    const int mine = r.tile_counts == nullptr ? static_cast<int>(begin) : static_cast<int>(blockIdx.x);
    int before = 0, count = 0;
#pragma unroll 8
    for (int k = threadIdx.x; k < parts; k += kCompactThreads) {
        const int active = r.tile_counts == nullptr ? __popc(r.words[k]) : r.tile_counts[k];
        count += active;
        before += k < mine ? active : 0;
    }
    sum_threads(before, count);
    list_active(r, static_cast<unsigned int>(begin), static_cast<unsigned int>(end), before);
    if (blockIdx.x == 0 && threadIdx.x == 0) tell_count(r, count);
    if (r.pad == 0) return;
    const int64 step = static_cast<int64>(gridDim.x) * kCompactThreads;
    for (int64 k = 3 * int64{count} + blockIdx.x * kCompactThreads + threadIdx.x; k < 3 * r.capacity; k += step) {
        r.indices[k] = -1;
    }
}

}  // namespace sbnet
