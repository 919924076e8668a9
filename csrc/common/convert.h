/* common/convert.h: half and bfloat16 as numbers, and one element of any type as a double.
 *
 * Portable and exact: round to nearest even, subnormals, infinities and NaN included, no double rounding on
 * the way from double to 16 bits. For code where one element at a time is fast enough. */
#ifndef FA_CONVERT_H
#define FA_CONVERT_H

#include <string.h>

#include "internal.h"

static inline uint32_t fa_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fa_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float fa_bfloat16_to_float(uint16_t bfloat)
{
    return fa_float_from_bits((uint32_t)bfloat << 16);
}

static inline uint16_t fa_float_to_bfloat16(float value)
{
    uint32_t bits = fa_float_bits(value);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);   /* rounding could carry a NaN's bits away */
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float fa_half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 0) return fa_float_from_bits(sign | fa_float_bits((float)mantissa * 0x1p-24f));
    uint32_t biased = exponent == 31 ? 255 : exponent + 112;    /* bias 15 becomes bias 127 */
    return fa_float_from_bits(sign | biased << 23 | mantissa << 13);
}

static inline uint16_t fa_float_to_half(float value)
{
    uint32_t bits = fa_float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  /* 65520 and more round to infinity */
    if (magnitude < 0x38800000) {   /* below 2^-14 an ulp is 2^-24, which is also 0.5f's: the adder rounds */
        float rounded = fa_float_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (fa_float_bits(rounded) - fa_float_bits(0.5f)));
    }
    magnitude += 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (magnitude - (112u << 23)) >> 13);
}

/* Rounds toward zero, then makes an inexact result odd: rounding that again to a shorter type is exact. */
static inline float fa_double_to_float_odd(double value)
{
    float nearest = (float)value;
    if (value != value || (double)nearest == value) return nearest;
    uint32_t bits = fa_float_bits(nearest);
    bool away = value > 0 ? (double)nearest > value : (double)nearest < value;
    return fa_float_from_bits((bits - away) | 1);
}

static inline double fa_load(enum fa_dtype dtype, const void *base, int64_t index)
{
    switch (dtype) {
    case FA_FLOAT32:  return ((const float *)base)[index];
    case FA_FLOAT16:  return fa_half_to_float(((const uint16_t *)base)[index]);
    case FA_BFLOAT16: return fa_bfloat16_to_float(((const uint16_t *)base)[index]);
    default:          return ((const double *)base)[index];
    }
}

static inline void fa_store(enum fa_dtype dtype, void *base, int64_t index, double value)
{
    switch (dtype) {
    case FA_FLOAT32:  ((float *)base)[index] = (float)value; break;
    case FA_FLOAT16:  ((uint16_t *)base)[index] = fa_float_to_half(fa_double_to_float_odd(value)); break;
    case FA_BFLOAT16: ((uint16_t *)base)[index] = fa_float_to_bfloat16(fa_double_to_float_odd(value)); break;
    default:          ((double *)base)[index] = value; break;
    }
}

#endif
