// reduce_mask, in two steps: block_activity pools every block of the grid into one flag; count_active and
// compact_active turn the flags into the ascending list of active blocks. The block size is a run-time number here:
// it bounds loops that the image's borders cut short anyway, so knowing it would not change the code.
#include "pool.cuh"
#include "transfer.cuh"

namespace sbnet {

constexpr int kPoolThreads = 256;
constexpr int kWarp = 32;
constexpr int kPoolWarps = kPoolThreads / kWarp;

// Argument of block_activity. Mirrored, field by field, by _pooling.py.
struct Pooling {
    const void* mask;         // [batch, height.extent, width.extent], strides in elements
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

// One CTA pools a strip of neighbouring blocks of one grid row. Each thread first reduces the rows of one pixel column,
// which reads the mask in coalesced lines and each pixel once however much blocks overlap sideways; then warps
// reduce the columns of each block. Wide strips go through shared memory in pieces of kPoolThreads columns.
// Registers: at most 80.
template <typename T, template <typename> class PoolOf>
__global__ void __launch_bounds__(kPoolThreads) block_activity(const Pooling p) {
    using Pool = PoolOf<T>;
    __shared__ Pool columns[kPoolThreads];
    __shared__ Pool blocks[kPoolThreads];

    const int64 strips = (p.blocks_w + p.strip - 1) / p.strip;
    const int64 grid_row = blockIdx.x / strips;
    const int64 first_block = blockIdx.x % strips * p.strip;
    const int block_count = static_cast<int>(first_block + p.strip < p.blocks_w ? p.strip : p.blocks_w - first_block);
    const int thread = threadIdx.x;
    const int lane = thread % kWarp;

    int64 top, bottom;
    pixels_of(p.height, p.block_h, grid_row % p.blocks_h, top, bottom);
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
    const int64 line = grid_row / p.blocks_h * p.mask_strides[0];
    for (int64 piece = left; piece < right; piece += kPoolThreads) {
        const int64 x = piece + thread;
        Pool column = Pool::none();
        // Where blocks leave gaps, the columns between them belong to none.
        const bool covered = (x - p.width.start) % p.width.stride < p.block_w;
        if (x < right && covered) {
#pragma unroll 8
            for (int64 y = top; y < bottom; ++y) {
                const int64 offset = line + y * p.mask_strides[1] + x * p.mask_strides[2];
                column.add(load<T>(p.mask, offset), p.threshold);
            }
        }
        columns[thread] = column;
        __syncthreads();
        for (int k = thread / kWarp; k < block_count; k += kPoolWarps) {
            int64 begin, end;
            pixels_of(p.width, p.block_w, first_block + k, begin, end);
            begin = begin > piece ? begin : piece;
            end = end < piece + kPoolThreads ? end : piece + kPoolThreads;
            if (begin >= end) continue;
            Pool block = Pool::none();
            for (int64 i = begin + lane; i < end; i += kWarp) block.add(columns[i - piece]);
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

// Argument of the compaction kernels. Mirrored, field by field, by _pooling.py.
struct Compaction {
    const unsigned char* activity;  // [blocks]
    int* tile_counts;               // [tiles]: active blocks of each tile
    int* indices;                   // [capacity, 3]
    int* bin_counts;                // [1]
    int64 blocks, blocks_h, blocks_w;
    int64 tile;      // blocks that one CTA compacts
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

// Registers: at most 64.
__global__ void __launch_bounds__(kCompactThreads) count_active(const Compaction c) {
    const int64 begin = blockIdx.x * c.tile;
    const int64 end = begin + c.tile < c.blocks ? begin + c.tile : c.blocks;
    int mine = 0, before, total;
    for (int64 i = begin + threadIdx.x; i < end; i += kCompactThreads) mine += c.activity[i];
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
    for (int64 piece = begin; piece < end; piece += kCompactThreads) {
        const int64 i = piece + threadIdx.x;
        const int active = i < end ? c.activity[i] : 0;
        int before, total;
        block_scan(active, before, total);
        const int64 row = next_row + before;
        if (active && row < c.capacity) {
            const int64 line = i / c.blocks_w;
            c.indices[3 * row] = static_cast<int>(line / c.blocks_h);
            c.indices[3 * row + 1] = static_cast<int>(line % c.blocks_h);
            c.indices[3 * row + 2] = static_cast<int>(i % c.blocks_w);
        }
        next_row += total;
    }
    if (c.tiles == 1) count = next_row;
    if (blockIdx.x == 0 && threadIdx.x == 0) *c.bin_counts = count;
    if (c.pad != 0) {
        const int64 step = static_cast<int64>(gridDim.x) * kCompactThreads;
        for (int64 k = 3 * int64{count} + blockIdx.x * kCompactThreads + threadIdx.x; k < 3 * c.capacity; k += step) {
            c.indices[k] = -1;
        }
    }
}

}  // namespace sbnet
