// What AMX takes from the kernels of AVX-512: all but the products, and these of few queries.
#pragma once

#include "simd/tiles.hpp"

namespace r2ec::avx512 {

void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
void multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                     float* squares);
uint32_t rows_above(const float* products, int64_t count, Epilogue epilogue, float need,
                    float relative);
uint32_t queries_above_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                            const float* need, float relative);
void column_maxima_bf16(RowBlock<Bfloat16> block, int64_t columns, Epilogue epilogue,
                        float relative, float* maxima);
void column_maxima_f32(RowBlock<float> block, int64_t columns, Epilogue epilogue, float relative,
                       float* maxima);
uint32_t queries_above_f32(const float* products, int64_t count, float scale, float half,
                           const float* need, float relative);
int64_t update_softmax(float* products, const float* scale, uint32_t allowed,
                       OnlineSoftmax& softmax, uint32_t& near_ties);

}  // namespace r2ec::avx512
