// The gradients of group norm, from sums over the pixels of each channel. Included by the other group norm
// headers only.
//
// With xhat the normalised x, u = xhat * gain + offset the argument of the activation and du the gradient there
// (fastldm/reference/group_norm.py), in one group of N elements with reciprocal standard deviation r:
//   P0 = sum_c gain sum du,  P1 = sum_c gain sum du xhat
//   dx = r (du gain - P0 / N - xhat P1 / N)
#pragma once

#include "group_norm_math.h"

namespace fastldm::FASTLDM_ISA {

// Over the pixels of one channel of one sample.
struct ChannelSums {
  double du = 0.0, du_xhat = 0.0, xhat = 0.0;

  void add(const ChannelSums& other) {
    du += other.du;
    du_xhat += other.du_xhat;
    xhat += other.xhat;
  }
};

// What the loops over pixels need of one channel of one sample:
//   xhat = (x - centre) * rstd,  the argument of SiLU = xhat * gain + offset,  dx = du * p + xhat * q + r
// for this xhat, which misses the residual of the mean, and with SiLU for du / -log2(e) (silu_slope).
struct ChannelGradient {
  Channel exact;
  double du_scale;
  float centre, rstd, gain, offset;
  float p, q, r;
};

// Whether the mean was rounded to float32 by more than 2^-19 standard deviations. Then it is computed again: a
// third pass over x, for data that is hardly ever met.
static inline bool mean_is_coarse(double mean, double rstd) { return __builtin_fabs(mean) * rstd > 64.0; }

// For each channel of the group what is known before the sums.
template <bool Silu>
static void start_group(const GroupNormBackward& call, std::int64_t n, std::int64_t g, double mean,
                        ChannelGradient* channels) {
  const std::int64_t count = call.channels / call.groups;
  const double rstd = call.rstd[n * call.groups + g];
  const double scale = Silu ? static_cast<double>(kMinusLog2E) : 1.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Channel channel(call, n, g * count + i, mean);
    channels[i].exact = channel;
    channels[i].centre = channel.centre;
    channels[i].rstd = quiet_nan(rstd);
    channels[i].gain = quiet_nan(scale * channel.gain);
    channels[i].offset = quiet_nan(scale * (channel.offset - channel.residual * rstd * channel.gain));
    channels[i].du_scale = scale;
    if constexpr (Silu) {
      const Saturation saturation(call, channel);
      if (saturation.low || saturation.high) {
        // Slopes of 0 and 1. A limited argument gives the one but for 2^-113, and the scale makes it exact.
        channels[i].gain = 0.0f;
        channels[i].offset = static_cast<float>(saturation.low ? kLargestExponent : -kLargestExponent);
        channels[i].du_scale = saturation.low ? 0.0 : scale;
      }
    }
  }
}

// Completes `channels` and writes the group's share of every gradient but that of x. `sums` are those of the xhat
// and du of ChannelGradient. dweight and dbias still have to be summed over the batch: channel c of sample n puts
// its parts in parameter_sums[2 (n C + c)] and the next, unless that is null.
template <bool Silu>
static void finish_group(const GroupNormBackward& call, std::int64_t n, std::int64_t g,
                         ChannelSums* sums, ChannelGradient* channels, double* parameter_sums) {
  const std::int64_t count = call.channels / call.groups;
  const double rstd = call.rstd[n * call.groups + g];
  const double pixels = static_cast<double>(call.pixels), elements = pixels * static_cast<double>(count);
  // The sum of xhat over a group is 0 but for the rounding of the mean, which it so reveals.
  double drift = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    drift += sums[i].xhat - pixels * channels[i].exact.residual * rstd;
  }
  drift /= elements;
  double p0 = 0.0, p1 = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Channel& channel = channels[i].exact;
    const double error = channel.residual * rstd + drift;
    sums[i].du *= channels[i].du_scale;
    sums[i].du_xhat = sums[i].du_xhat * channels[i].du_scale - error * sums[i].du;
    sums[i].xhat -= error * pixels;
    p0 += channel.gain * sums[i].du;
    p1 += channel.gain * sums[i].du_xhat;
  }
  p0 /= elements;
  p1 /= elements;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t c = g * count + i, nc = n * call.channels + c;
    const Channel& channel = channels[i].exact;
    const double error = channel.residual * rstd + drift;
    channels[i].p = quiet_nan(channels[i].du_scale * rstd * channel.gain);
    channels[i].q = quiet_nan(-rstd * p1);
    channels[i].r = quiet_nan(-rstd * (p0 - error * p1));
    if (call.grad_channel_bias) {
      const double total = channel.gain * sums[i].du - pixels * p0 - sums[i].xhat * p1;
      call.grad_channel_bias[nc] = static_cast<float>(rstd * total);
    }
    if (call.grad_shift) call.grad_shift[nc] = static_cast<float>(sums[i].du);
    if (call.grad_scale) {
      const double weight = call.weight ? call.weight[c] : 1.0, bias = call.bias ? call.bias[c] : 0.0;
      call.grad_scale[nc] = static_cast<float>(sums[i].du_xhat * weight + sums[i].du * bias);
    }
    if (parameter_sums) {
      const double scale = call.scale ? 1.0 + static_cast<double>(call.scale[nc]) : 1.0;
      parameter_sums[2 * nc] = scale * sums[i].du_xhat;
      parameter_sums[2 * nc + 1] = scale * sums[i].du;
    }
  }
}

// dweight and dbias from the parts of every sample.
static void sum_parameters(const GroupNormBackward& call, const double* parameter_sums) {
  for (std::int64_t c = 0; c < call.channels; ++c) {
    double weight = 0.0, bias = 0.0;
    for (std::int64_t n = 0; n < call.batch; ++n) {
      weight += parameter_sums[2 * (n * call.channels + c)];
      bias += parameter_sums[2 * (n * call.channels + c) + 1];
    }
    if (call.grad_weight) call.grad_weight[c] = static_cast<float>(weight);
    if (call.grad_bias) call.grad_bias[c] = static_cast<float>(bias);
  }
}

}  // namespace fastldm::FASTLDM_ISA
