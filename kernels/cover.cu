// Builds the cover map, one thread for each stack row. The host has set every head to kNoRow.
#include "cover.cuh"

namespace sbnet {

// The head that a row belongs to, or null for a row that touches no pixel. Every block that the host's Axis counts
// touches the image, whatever its size: the block size is no parameter here.
__device__ inline int* head_of(const Transfer& t, const Cover& cover, int64 row) {
    if (row >= t.rows) return nullptr;
    const Placement<unsigned long long> at = place<unsigned long long, 1, 1>(t, row);
    return at.touches_image ? cover.head + cell_index(t, at.image_index, at.cell_h, at.cell_w) : nullptr;
}

// head = the last row of each block: all that overwriting needs.
// Registers: at most 32.
__global__ void __launch_bounds__(kMaxThreads) cover_last(const Transfer t, const Cover cover) {
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    int* head = head_of(t, cover, row);
    if (head != nullptr) atomicMax(head, static_cast<int>(row));
}

// head and next = all rows of each block as an ascending list. Rows insert themselves in any order, and only ever
// insert, so compare-and-swap needs no more care; the sorted list of a set of rows is the same however it grew.
// Registers: at most 32.
__global__ void __launch_bounds__(kMaxThreads) cover_all(const Transfer t, const Cover cover) {
    const int64 index = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    int* link = head_of(t, cover, index);
    if (link == nullptr) return;
    const int row = static_cast<int>(index);
    for (;;) {
        int after = *static_cast<volatile int*>(link);
        while (after != kNoRow && after < row) {
            link = cover.next + after;
            after = *static_cast<volatile int*>(link);
        }
        *static_cast<volatile int*>(cover.next + row) = after;
        __threadfence();  // whoever finds this row must find its successor too
        if (atomicCAS(link, after, row) == after) return;
    }
}

}  // namespace sbnet
