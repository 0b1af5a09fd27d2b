// What this CPU and its operating system allow.
#pragma once

#include <string>

namespace entropyserve {

struct CpuFeatures {
  bool avx2 = false;    // with FMA and F16C: x86-64-v3
  bool avx512 = false;  // F, BW, CD, DQ, VL: x86-64-v4
  bool avx512_bf16 = false;
  bool amx_bf16 = false;  // the kernel granted tile registers to this process, too
};

// Looked up once per call: keep the result. Asks Linux for permission to use AMX tiles.
CpuFeatures DetectCpuFeatures();

// "avx512, avx512_bf16, amx_bf16", "avx2", "baseline"
std::string ToString(const CpuFeatures& features);

}  // namespace entropyserve
