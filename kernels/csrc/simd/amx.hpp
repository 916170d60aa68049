// Products by AMX tiles. The rest of its kernels are those of AVX-512.
#pragma once

#include "simd/tiles.hpp"

namespace r2ec::amx {

bool is_available();  // on this CPU, and granted to this process by the system

void prepare_codes(CodeOperand& operand);
void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
void prepare_floats(FloatOperand& operand);
void multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                     float* squares);

}  // namespace r2ec::amx
