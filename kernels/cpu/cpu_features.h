// What this machine's processor and operating system can run, asked once.
#pragma once

namespace shardmesh {

struct CpuFeatures {
  bool avx2;     // AVX2, FMA and F16C, with ymm state saved by the operating system
  bool avx512;   // AVX-512 F, BW, VL, DQ and VNNI, with zmm and mask state saved
  bool amx;      // AVX-512 as above, AMX tiles and their int8 products, and the system's leave to use them
  char vendor[13];
  char model[49];  // brand string, empty when the processor has none
};

const CpuFeatures& cpu_features();

}  // namespace shardmesh
