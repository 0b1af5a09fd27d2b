#include "kernels/cpu/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace entropyserve {
namespace {

#if defined(__x86_64__)

bool Bit(uint32_t word, int bit) { return (word >> bit) & 1u; }

// XCR0: which register files the operating system saves.
uint64_t EnabledState() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool AskForTiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

}  // namespace

CpuFeatures DetectCpuFeatures() {
  CpuFeatures features;
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool os_saves = Bit(c, 27), fma = Bit(c, 12), f16c = Bit(c, 29), avx = Bit(c, 28);
  if (!os_saves || !avx) return features;
  const uint64_t state = EnabledState();
  uint32_t a7, b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return features;
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  features.avx2 = ymm && fma && f16c && Bit(b7, 5);
  features.avx512 = features.avx2 && zmm && Bit(b7, 16) && Bit(b7, 17) && Bit(b7, 28) &&
                    Bit(b7, 30) && Bit(b7, 31);
  uint32_t a71, b71, c71, d71;
  features.avx512_bf16 =
      features.avx512 && a7 >= 1 && __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && Bit(a71, 5);
  const bool tiles = (state & 0x60000) == 0x60000 && Bit(d7, 22) && Bit(d7, 24);
  features.amx_bf16 = features.avx512_bf16 && tiles && AskForTiles();
#endif
  return features;
}

std::string ToString(const CpuFeatures& features) {
  if (!features.avx2) return "baseline";
  if (!features.avx512) return "avx2";
  std::string text = "avx512";
  if (features.avx512_bf16) text += ", avx512_bf16";
  if (features.amx_bf16) text += ", amx_bf16";
  return text;
}

}  // namespace entropyserve
