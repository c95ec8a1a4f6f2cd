// What the units of one instruction set define for each other and for the table of isa/kernels.h.
#pragma once

#include "isa/kernels.h"

namespace kl::KL_ISA {

constexpr std::int64_t kBlock = 32768;  // columns of the unit of work where a row is split over threads

State sweep_block(const Row&, std::int64_t first, std::int64_t last);
RowResult fallback(const Row&);
bool has_far_column(const Row&, double shift);
FormulaSums formula_sums(const Row&, const RowScalars&, std::int64_t first, std::int64_t last);
void gradient(const Row&, const RowScalars&, Destination to_a, Destination to_b, std::int64_t first,
              std::int64_t last, bool non_temporal, const LabelTerm&);
PairState sweep_pair_block(const Row&, std::int64_t first, std::int64_t last);
SideResult side_result(const void* logits, Dtype, std::int64_t columns, double scale);
double logit(const void* logits, Dtype, std::int64_t column);
std::int64_t find(const void* logits, Dtype, std::int64_t first, std::int64_t columns, float logit);
extern const ComplementKernels complement_kernels;

// n columns of one format, instantiated in the units that bear their names.
template <class T>
void kl_gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars&, T* to_a,
                     T* to_b, bool non_temporal);
// The same with a label's term beside it, to one side alone; false where that is not to be had.
template <class T>
bool kl_gradient_with_label(const T* a, const T* b, std::int64_t n, double scale, const RowScalars&,
                            const LabelTerm&, T* to_a, T* to_b, bool non_temporal);
template <class T>
void formula_gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars&, T* to_a,
                          T* to_b, bool non_temporal);
template <class T>
FormulaSums formula_sums_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars&);

}  // namespace kl::KL_ISA
