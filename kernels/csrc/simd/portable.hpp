// What AVX2 takes from the kernels in plain C++.
#pragma once

#include "simd/tiles.hpp"

namespace r2ec::portable {

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

}  // namespace r2ec::portable
