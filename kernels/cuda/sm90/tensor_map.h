// Tensor maps: how the bulk tensor copies see queries and pages. Host code.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

namespace entropyserve::sm90 {

// bf16, 128-byte swizzle, zeros outside. Dimension 0 is contiguous; strides_bytes are those of the
// others. False if the driver lacks the encoder or refuses the map.
bool EncodeMap(CUtensorMap* map, const void* base, std::span<const uint64_t> dims,
               std::span<const uint64_t> strides_bytes, std::span<const uint32_t> box);

// A pool half, [pages, 64, head_dim], as {64, 8, head_dim / 64, pages * 8} with box
// {64, 8, head_dim / 64, box_groups}: groups of 8 tokens arrive as [head_dim / 64][8][64].
bool EncodePages(CUtensorMap* map, const void* pool, int32_t head_dim, int64_t pages,
                 int32_t box_groups);

}  // namespace entropyserve::sm90
