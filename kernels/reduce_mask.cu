// reduce_mask, in two steps: block_activity pools every block of the grid into one flag; count_active and
// compact_active turn the flags into the ascending list of active blocks. The block size is a run-time number here:
// it bounds loops that the image's borders cut short anyway, so knowing it would not change the code.
#include "pool.cuh"
#include "transfer.cuh"

namespace sbnet {

constexpr int kPoolThreads = 256;
constexpr int kPoolWarps = kPoolThreads / kWarp;

// Rows that a thread has in flight at once: 18, of a 16-pixel block with a halo, take three batches.
constexpr int kPoolRows = 6;

// Argument of block_activity. Mirrored, field by field, by _pooling.py.
struct Pooling {
    const void* mask;         // [batch, height.extent, width.extent], strides in pixels
    unsigned char* activity;  // [batch, blocks_h, blocks_w]: 1 for an active block
    int64 mask_strides[3];
    int64 block_h, block_w;
    int64 blocks_h, blocks_w;  // of the grid
    int64 strip;               // blocks of one grid row that a CTA pools, at most kPoolThreads
    Axis height, width;
    Threshold threshold;
};

// In-image pixels [begin, end) of block `index` along an axis; none for a block outside of the image.
__device__ inline void pixels_of(const Axis& axis, int64 size, int64 index, int64& begin, int64& end) {
    const int64 cell = index - axis.first;
    begin = end = 0;
    if (cell < 0 || cell >= axis.count) return;
    const int64 origin = axis.start + cell * axis.stride;
    begin = origin < 0 ? 0 : origin;
    end = origin + size < axis.extent ? origin + size : axis.extent;
}

// One CTA pools a strip of neighbouring blocks of one grid row. First each thread reduces some rows of kLanes neighbouring
// columns, which reads the mask in coalesced lines, and each pixel once however much blocks overlap sideways; then
// warps reduce the columns of each block. blockDim.x threads share a row, blockDim.y rows are read at once: many where
// there is little to read, so that no thread waits for memory twice. Wide strips are taken in pieces.
// Registers: at most 80.
template <typename T, template <typename> class PoolOf, int kLanes>
__global__ void __launch_bounds__(kPoolThreads, 3) block_activity(const Pooling p) {
    using Pool = PoolOf<T>;
    __shared__ Pool columns[kPoolThreads * kLanes];  // [blockDim.y][piece]
    __shared__ Pool blocks[kPoolThreads];

    // Blocks are fewer than 2^31, and dividing 64-bit numbers takes longer than all else here.
    const unsigned int strip = static_cast<unsigned int>(p.strip);
    const unsigned int strips = (static_cast<unsigned int>(p.blocks_w) + strip - 1) / strip;
    const unsigned int grid_row = blockIdx.x / strips;
    const int64 first_block = blockIdx.x % strips * strip;
    const int block_count = static_cast<int>(first_block + p.strip < p.blocks_w ? p.strip : p.blocks_w - first_block);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int lane = thread % kWarp;
    const int piece_width = blockDim.x * kLanes;

    int64 top, bottom;
    const unsigned int image = grid_row / static_cast<unsigned int>(p.blocks_h);
    pixels_of(p.height, p.block_h, grid_row - image * p.blocks_h, top, bottom);
    // The strip's columns: those of its blocks that lie in the image.
    const int64 inside_first = first_block > p.width.first ? first_block : p.width.first;
    const int64 inside_last = first_block + block_count < p.width.first + p.width.count
                                  ? first_block + block_count - 1
                                  : p.width.first + p.width.count - 1;
    int64 left = 0, right = 0, unused;
    if (inside_first <= inside_last) {
        pixels_of(p.width, p.block_w, inside_first, left, unused);
        pixels_of(p.width, p.block_w, inside_last, unused, right);
    }

    if (thread < block_count) blocks[thread] = Pool::none();
    const int64 origin = image * p.mask_strides[0];
    for (int64 piece = left - left % kLanes; piece < right; piece += piece_width) {
        const int64 x = piece + static_cast<int>(threadIdx.x) * kLanes;
        Pool column[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) column[i] = Pool::none();
        // Where blocks leave gaps, the columns between them belong to none.
        const bool covered = p.width.stride <= p.block_w || (x - p.width.start) % p.width.stride < p.block_w;
        if (x < right && covered) {
            for (int64 y = top + threadIdx.y; y < bottom; y += kPoolRows * blockDim.y) {
                Vec<T, kLanes> pixels[kPoolRows];
#pragma unroll
                for (int u = 0; u < kPoolRows; ++u) {
                    const int64 row = y + u * blockDim.y;
                    const int64 offset = origin + (row < bottom ? row : y) * p.mask_strides[1] + x * p.mask_strides[2];
                    pixels[u] = load_lanes<T, kLanes>(p.mask, offset);
                }
#pragma unroll
                for (int u = 0; u < kPoolRows; ++u) {
                    const bool valid = y + u * blockDim.y < bottom;
#pragma unroll
                    for (int i = 0; i < kLanes; ++i) column[i].add(pixels[u].lane[i], p.threshold, valid);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kLanes; ++i) columns[thread * kLanes + i] = column[i];
        __syncthreads();
        for (int k = thread / kWarp; k < block_count; k += kPoolWarps) {
            int64 begin, end;
            pixels_of(p.width, p.block_w, first_block + k, begin, end);
            begin = begin > piece ? begin : piece;
            end = end < piece + piece_width ? end : piece + piece_width;
            if (begin >= end) continue;
            Pool block = Pool::none();
            for (int rows = 0; rows < static_cast<int>(blockDim.y); ++rows) {
                for (int64 i = begin - piece + lane; i < end - piece; i += kWarp) {
                    block.add(columns[rows * piece_width + i]);
                }
            }
#pragma unroll
            for (int distance = kWarp / 2; distance > 0; distance /= 2) block.add(block.from_lane(distance));
            if (lane == 0) blocks[k].add(block);
        }
        __syncthreads();
    }
    if (thread < block_count) {
        p.activity[grid_row * p.blocks_w + first_block + thread] = blocks[thread].active(p.threshold);
    }
}

constexpr int kCompactThreads = 1024;
constexpr int kCompactWarps = kCompactThreads / kWarp;

// Flags that a thread looks at at once. The host rounds the flags' memory up to a multiple of it.
constexpr int kFlags = 8;
constexpr int kCompactPiece = kCompactThreads * kFlags;

// Argument of the compaction kernels. Mirrored, field by field, by _pooling.py.
struct Compaction {
    const unsigned char* activity;  // [blocks], and room for a multiple of kFlags
    int* tile_counts;               // [tiles]: active blocks of each tile
    int* indices;                   // [capacity, 3]
    int* bin_counts;                // [1]
    int* host_count;                // the same in the host's memory, or null
    int64 blocks, blocks_h, blocks_w;
    int64 tile;      // blocks that one CTA compacts, a multiple of kCompactPiece
    int64 tiles;     // at most kCompactThreads, so that one CTA can sum all counts at once
    int64 capacity;  // rows of indices
    int64 pad;       // not 0: rows from the count on become (-1, -1, -1)
};

// Sum of `value` over the CTA, and over the threads before this one.
__device__ inline void block_scan(int value, int& before, int& total) {
    __shared__ int warp_sums[kCompactWarps];
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
    }
    __syncthreads();  // the sums of an earlier scan may still be read
    if (lane == kWarp - 1) warp_sums[warp] = sum;
    __syncthreads();
    before = sum - value;
    total = 0;
    for (int w = 0; w < kCompactWarps; ++w) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
}

// The flags of kFlags neighbouring blocks from `first` on; those at or past `end` are 0.
__device__ inline Vec<unsigned char, kFlags> flags_at(const Compaction& c, int64 first, int64 end) {
    Vec<unsigned char, kFlags> flags{};
    if (first < end) flags = load_lanes<unsigned char, kFlags>(c.activity, first);
#pragma unroll
    for (int i = 0; i < kFlags; ++i) {
        if (first + i >= end) flags.lane[i] = 0;
    }
    return flags;
}

__device__ inline int count_flags(const Vec<unsigned char, kFlags>& flags) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kFlags; ++i) count += flags.lane[i];
    return count;
}

// Registers: at most 64.
__global__ void __launch_bounds__(kCompactThreads) count_active(const Compaction c) {
    const int64 begin = blockIdx.x * c.tile;
    const int64 end = begin + c.tile < c.blocks ? begin + c.tile : c.blocks;
    int mine = 0, before, total;
    for (int64 piece = begin; piece < end; piece += kCompactPiece) {
        mine += count_flags(flags_at(c, piece + threadIdx.x * kFlags, end));
    }
    block_scan(mine, before, total);
    if (threadIdx.x == 0) c.tile_counts[blockIdx.x] = total;
}

// Each CTA lists the active blocks of its tile, behind those of all tiles before it.
// Registers: at most 64.
__global__ void __launch_bounds__(kCompactThreads) compact_active(const Compaction c) {
    __shared__ int first_row;
    int next_row = 0, count = 0;
    if (c.tiles > 1) {
        const int mine = threadIdx.x < c.tiles ? c.tile_counts[threadIdx.x] : 0;
        int before;
        block_scan(mine, before, count);
        if (threadIdx.x == blockIdx.x) first_row = before;
        __syncthreads();
        next_row = first_row;
    }
    const int64 begin = blockIdx.x * c.tile;
    const int64 end = begin + c.tile < c.blocks ? begin + c.tile : c.blocks;
    for (int64 piece = begin; piece < end; piece += kCompactPiece) {
        const int64 first = piece + threadIdx.x * kFlags;
        const auto flags = flags_at(c, first, end);
        int before, total;
        block_scan(count_flags(flags), before, total);
        int64 row = next_row + before;
#pragma unroll 1
        for (int i = 0; i < kFlags; ++i) {
            if (flags.lane[i] == 0) continue;
            if (row < c.capacity) {
                // Blocks are fewer than 2^31: 64-bit divisions would take most of the kernel's time.
                const unsigned int block = static_cast<unsigned int>(first + i);
                const unsigned int line = block / static_cast<unsigned int>(c.blocks_w);
                const unsigned int image = line / static_cast<unsigned int>(c.blocks_h);
                c.indices[3 * row] = static_cast<int>(image);
                c.indices[3 * row + 1] = static_cast<int>(line - image * static_cast<unsigned int>(c.blocks_h));
                c.indices[3 * row + 2] = static_cast<int>(block - line * static_cast<unsigned int>(c.blocks_w));
            }
            ++row;
        }
        next_row += total;
    }
    if (c.tiles == 1) count = next_row;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *c.bin_counts = count;
        if (c.host_count != nullptr) *c.host_count = count;
    }
    if (c.pad != 0) {
        const int64 step = static_cast<int64>(gridDim.x) * kCompactThreads;
        for (int64 k = 3 * int64{count} + blockIdx.x * kCompactThreads + threadIdx.x; k < 3 * c.capacity; k += step) {
            c.indices[k] = -1;
        }
    }
}

}  // namespace sbnet
