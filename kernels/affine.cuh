// The element-wise step act(x * scale + shift), with a scale and a shift for each channel: a policy of gather and
// activate.
#pragma once

#include "combine.cuh"
#include "ptx.cuh"
#include "vec.cuh"

namespace sbnet {

// The step for kLanes neighbouring channels of numbers of type T. Half types are computed in float32. Each operation is
// rounded, as in NumPy: a fused multiply-add would differ in the last bit.
template <typename T, int kLanes>
struct Affine {
    using Wide = typename Addition<T>::Total;

    Wide scale[kLanes], shift[kLanes];
    bool has_scale, has_shift, has_relu;

    // `scales` and `shifts` hold a Wide for each channel and are aligned to 16 bytes, or null where there is no such
    // step; `channel`, the first of the lanes, is a multiple of kLanes.
    __device__ Affine(const void* scales, const void* shifts, bool relu, int64 channel)
        : has_scale(scales != nullptr), has_shift(shifts != nullptr), has_relu(relu) {
        if (has_scale) load_channels(scales, channel, scale);
        if (has_shift) load_channels(shifts, channel, shift);
    }

    // Rounded to numbers of type Out once.
    template <typename Out>
    __device__ Vec<Out, kLanes> map(const Vec<T, kLanes>& x) const {
        Vec<Out, kLanes> y;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) y.lane[i] = Addition<Out>::end(step(Addition<T>::begin(x.lane[i]), i));
        return y;
    }

   private:
    __device__ Wide step(Wide y, int i) const {
        if (has_scale) y = mul_exact(y, scale[i]);
        if (has_shift) y = add_exact(y, shift[i]);
        return has_relu && greater_exact(Wide{0}, y) ? Wide{0} : y;
    }

    __device__ static void load_channels(const void* address, int64 channel, Wide (&values)[kLanes]) {
        constexpr int kMost = 16 / sizeof(Wide);
        constexpr int kAtOnce = kLanes < kMost ? kLanes : kMost;
        static_assert(kLanes % kAtOnce == 0, "lanes are a power of two");
#pragma unroll
        for (int i = 0; i < kLanes; i += kAtOnce) {
            const auto part = load_lanes<Wide, kAtOnce>(address, channel + i);
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) values[i + k] = part.lane[k];
        }
    }
};

}  // namespace sbnet
