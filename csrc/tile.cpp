// The inner loops of the search, once as templates, then compiled for each width of vector units.

#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The width is chosen when the library is loaded. Without contraction all give the same bits. Not for
// sanitizers: they would instrument the chooser, which runs before they are set up.
#if defined(__x86_64__) && defined(__linux__) && !defined(DIFFNL_SANITIZE)
#define DIFFNL_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIFFNL_VECTOR_CLONES
#endif
#define DIFFNL_INLINE [[gnu::always_inline]] inline

namespace diffnl {

namespace {

template <typename T>
DIFFNL_INLINE Vec3<T> vector_to(const Tile<T>& t, int c, Vec3<T> ri) {
  return pair_vector<T>(ri, {t.x[c], t.y[c], t.z[c]}, {t.tx[c], t.ty[c], t.tz[c]});
}

template <typename T>
DIFFNL_INLINE void translate_loop(Tile<T>& t, const T* h) {
  for (int c = 0; c < t.size; ++c) {
    const T s0 = t.s0[c] + t.w0, s1 = t.s1[c] + t.w1, s2 = t.s2[c] + t.w2;
    t.tx[c] = cell_translation(s0, s1, s2, h, 0);
    t.ty[c] = cell_translation(s0, s1, s2, h, 1);
    t.tz[c] = cell_translation(s0, s1, s2, h, 2);
  }
}

template <typename T>
DIFFNL_INLINE int count_loop(const Tile<T>& t, Vec3<T> ri, T cutoff2) {
  int count = 0;
  for (int c = 0; c < t.size; ++c) count += squared_length(vector_to(t, c, ri)) < cutoff2 ? 1 : 0;
  return count;
}

template <typename T>
DIFFNL_INLINE void measure_loop(Tile<T>& t, Vec3<T> ri) {
  for (int c = 0; c < t.size; ++c) t.d2[c] = squared_length(vector_to(t, c, ri));
}

template <typename T>
DIFFNL_INLINE void write_loop(const Tile<T>& t, Vec3<T> ri, const int32_t* __restrict chosen, int count,
                              int64_t* __restrict mapping_j, int32_t* __restrict shifts, T* __restrict vectors) {
  for (int n = 0; n < count; ++n) mapping_j[n] = t.j[chosen[n]];
  for (int n = 0; n < count; ++n) {
    const int c = chosen[n];
    shifts[3 * n] = static_cast<int32_t>(t.s0[c] + t.w0);
    shifts[3 * n + 1] = static_cast<int32_t>(t.s1[c] + t.w1);
    shifts[3 * n + 2] = static_cast<int32_t>(t.s2[c] + t.w2);
  }
  for (int n = 0; n < count; ++n) {
    const Vec3<T> v = vector_to(t, chosen[n], ri);
    vectors[3 * n] = v.x;
    vectors[3 * n + 1] = v.y;
    vectors[3 * n + 2] = v.z;
  }
}

// Twice a positive part is d + |d|: a comparison here would keep some compilers from vectorizing.
template <typename T>
DIFFNL_INLINE void gap_loop(const T* __restrict x, const T* __restrict y, const T* __restrict z, int size,
                            Vec3<T> image, const Box<T>& box, T* __restrict gaps4) {
  const T x0 = image.x - box.centre[0], y0 = image.y - box.centre[1], z0 = image.z - box.centre[2];
  for (int n = 0; n < size; ++n) {
    const T dx = std::abs(x[n] + x0) - box.half[0];
    const T dy = std::abs(y[n] + y0) - box.half[1];
    const T dz = std::abs(z[n] + z0) - box.half[2];
    gaps4[n] = squared_length<T>({dx + std::abs(dx), dy + std::abs(dy), dz + std::abs(dz)});
  }
}

template <typename T>
DIFFNL_INLINE Vec3<T> translation_of(const RowSource<T>& source, int32_t image) {
  return {source.tx[image], source.ty[image], source.tz[image]};
}

template <typename T>
DIFFNL_INLINE Vec3<T> position_of(const RowSource<T>& source, int32_t j) {
  return {source.x[j], source.y[j], source.z[j]};
}

template <typename T>
DIFFNL_INLINE void measure_candidates_loop(const RowSource<T>& source, const CandidateRow<T>& row,
                                           T* __restrict d2) {
  if (row.uniform >= 0) {
    const Vec3<T> t = translation_of(source, row.uniform);
    for (int c = 0; c < row.size; ++c)
      d2[c] = squared_length(pair_vector<T>(row.ri, position_of(source, row.j[c]), t));
  } else {
    for (int c = 0; c < row.size; ++c)
      d2[c] = squared_length(
          pair_vector<T>(row.ri, position_of(source, row.j[c]), translation_of(source, row.image[c])));
  }
}

template <typename T>
DIFFNL_INLINE void measure_vectors_loop(const T* __restrict vectors, int size, T* __restrict d2) {
  for (int c = 0; c < size; ++c)
    d2[c] = squared_length<T>({vectors[3 * c], vectors[3 * c + 1], vectors[3 * c + 2]});
}

// Selection: a branch for each entry would be mispredicted too often, so entries are compared several at a time
// and the numbers of those that pass are moved together in a register.
template <typename T>
inline int select_plain(const T* values, int n, int size, T limit, int32_t* chosen, int count) {
  for (; n < size; ++n) {
    chosen[count] = n;
    count += values[n] < limit ? 1 : 0;
  }
  return count;
}

#if defined(__x86_64__)
// SSE2, which is always there: four comparisons pick one of sixteen ready-made lists of positions.
inline int mask_below(const float* values, float limit) {
  return _mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(values), _mm_set1_ps(limit)));
}
inline int mask_below(const double* values, double limit) {
  const int low = _mm_movemask_pd(_mm_cmplt_pd(_mm_loadu_pd(values), _mm_set1_pd(limit)));
  const int high = _mm_movemask_pd(_mm_cmplt_pd(_mm_loadu_pd(values + 2), _mm_set1_pd(limit)));
  return low | high << 2;
}

struct SetBits {
  alignas(16) int32_t position[16][4];
  int32_t count[16];
};
constexpr SetBits make_set_bits() {
  SetBits bits{};
  for (int mask = 0; mask < 16; ++mask)
    for (int bit = 0; bit < 4; ++bit)
      if (mask >> bit & 1) bits.position[mask][bits.count[mask]++] = bit;
  return bits;
}
constexpr SetBits kSetBits = make_set_bits();

template <typename T>
int select_sse2(const T* values, int size, T limit, int32_t* chosen) {
  int count = 0;
  const int whole = size & ~3;
  for (int n = 0; n < whole; n += 4) {
    const int mask = mask_below(values + n, limit);
    const __m128i position = _mm_load_si128(reinterpret_cast<const __m128i*>(kSetBits.position[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(chosen + count), _mm_add_epi32(position, _mm_set1_epi32(n)));
    count += kSetBits.count[mask];
  }
  return select_plain(values, whole, size, limit, chosen, count);
}

// AVX-512 compresses the numbers themselves.
#define DIFFNL_AVX512 __attribute__((target("avx512f")))
DIFFNL_AVX512 inline unsigned mask16_below(const float* values, float limit) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(limit), _CMP_LT_OQ);
}
DIFFNL_AVX512 inline unsigned mask16_below(const double* values, double limit) {
  const __m512d limits = _mm512_set1_pd(limit);
  const unsigned low = _mm512_cmp_pd_mask(_mm512_loadu_pd(values), limits, _CMP_LT_OQ);
  const unsigned high = _mm512_cmp_pd_mask(_mm512_loadu_pd(values + 8), limits, _CMP_LT_OQ);
  return low | high << 8;
}

template <typename T>
DIFFNL_AVX512 int select_avx512(const T* values, int size, T limit, int32_t* chosen) {
  int count = 0;
  const int whole = size & ~15;
  __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int n = 0; n < whole; n += 16) {
    const unsigned mask = mask16_below(values + n, limit);
    _mm512_storeu_si512(chosen + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), number));
    number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    count += __builtin_popcount(mask);
  }
  return select_plain(values, whole, size, limit, chosen, count);
}

template <typename T>
int select_loop(const T* values, int size, T limit, int32_t* chosen) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  return has_avx512 ? select_avx512(values, size, limit, chosen) : select_sse2(values, size, limit, chosen);
}
#else
template <typename T>
int select_loop(const T* values, int size, T limit, int32_t* chosen) {
  return select_plain(values, 0, size, limit, chosen, 0);
}
#endif

}  // namespace

// target_clones takes no templates: one function a type.
DIFFNL_VECTOR_CLONES void translate(Tile<float>& tile, const float* h) { translate_loop(tile, h); }
DIFFNL_VECTOR_CLONES void translate(Tile<double>& tile, const double* h) { translate_loop(tile, h); }

DIFFNL_VECTOR_CLONES int count_within(const Tile<float>& tile, Vec3<float> ri, float cutoff2) {
  return count_loop(tile, ri, cutoff2);
}
DIFFNL_VECTOR_CLONES int count_within(const Tile<double>& tile, Vec3<double> ri, double cutoff2) {
  return count_loop(tile, ri, cutoff2);
}

DIFFNL_VECTOR_CLONES void measure(Tile<float>& tile, Vec3<float> ri) { measure_loop(tile, ri); }
DIFFNL_VECTOR_CLONES void measure(Tile<double>& tile, Vec3<double> ri) { measure_loop(tile, ri); }

DIFFNL_VECTOR_CLONES void write_row(const Tile<float>& tile, Vec3<float> ri, const int32_t* chosen, int count,
                                    int64_t* mapping_j, int32_t* shifts, float* vectors) {
  write_loop(tile, ri, chosen, count, mapping_j, shifts, vectors);
}
DIFFNL_VECTOR_CLONES void write_row(const Tile<double>& tile, Vec3<double> ri, const int32_t* chosen, int count,
                                    int64_t* mapping_j, int32_t* shifts, double* vectors) {
  write_loop(tile, ri, chosen, count, mapping_j, shifts, vectors);
}

DIFFNL_VECTOR_CLONES void measure_candidates(const RowSource<float>& source, const CandidateRow<float>& row,
                                             float* d2) {
  measure_candidates_loop(source, row, d2);
}
DIFFNL_VECTOR_CLONES void measure_candidates(const RowSource<double>& source, const CandidateRow<double>& row,
                                             double* d2) {
  measure_candidates_loop(source, row, d2);
}

DIFFNL_VECTOR_CLONES void measure_vectors(const float* vectors, int size, float* d2) {
  measure_vectors_loop(vectors, size, d2);
}
DIFFNL_VECTOR_CLONES void measure_vectors(const double* vectors, int size, double* d2) {
  measure_vectors_loop(vectors, size, d2);
}

DIFFNL_VECTOR_CLONES void measure_gaps4(const float* x, const float* y, const float* z, int size,
                                        Vec3<float> image, const Box<float>& box, float* gaps4) {
  gap_loop(x, y, z, size, image, box, gaps4);
}
DIFFNL_VECTOR_CLONES void measure_gaps4(const double* x, const double* y, const double* z, int size,
                                        Vec3<double> image, const Box<double>& box, double* gaps4) {
  gap_loop(x, y, z, size, image, box, gaps4);
}

int select_below(const float* values, int size, float limit, int32_t* chosen) {
  return select_loop(values, size, limit, chosen);
}
int select_below(const double* values, int size, double limit, int32_t* chosen) {
  return select_loop(values, size, limit, chosen);
}

}  // namespace diffnl
