// The kernels as Python sees them: addresses, strides and sizes as integers, the GIL released.
// kl_gpu's native backend is the only caller and hands over nothing it has not checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "api.h"
#include "runtime/dispatch.h"
#include "runtime/kept_memory.h"
#include "runtime/memory.h"
#include "runtime/tensor_memory.h"
#include "testing/bandwidth.h"
#include "testing/slow_rows.h"
#include "shards/merge.h"
#include "complement/complement.h"

namespace nb = nanobind;

namespace {

using Address = std::uintptr_t;
using Side = std::tuple<Address, std::int64_t, std::int64_t, int, double>;  // data, strides, dtype, scale
using Target = std::tuple<Address, std::int64_t, std::int64_t, int>;        // data or 0, strides, dtype
using Valid = std::tuple<Address, std::int64_t, std::int64_t>;              // data or 0, strides
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, int>;    // A, B, V, threads
using Scales = std::tuple<Address, std::int64_t>;                           // data or 0, columns
using Pair = std::tuple<Side, Side, Valid, Sizes, std::string, double, bool, Scales>;  // formula, beta, fp64
using Complement = std::tuple<Side, Valid, Sizes, Address, std::int64_t, Scales>;      // ids, ids per row
// Whose, entropies, labels, their scales, surprises, their factors in the gradient.
using Beside = std::tuple<bool, Address, Address, Address, Address, Address>;
using Units = std::tuple<double, Address>;  // of all, or of each row

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

kl::Logits logits(const Side& side) {
    const auto& [data, stride_a, stride_b, dtype, scale] = side;
    return {pointer(data), stride_a, stride_b, static_cast<kl::Dtype>(dtype), scale};
}

kl::Gradient target(const Target& to) {
    const auto& [data, stride_a, stride_b, dtype] = to;
    return {pointer(data), stride_a, stride_b, static_cast<kl::Dtype>(dtype)};
}

kl::RowMask row_mask(const Valid& valid) {
    const auto& [data, stride_a, stride_b] = valid;
    return {pointer<const std::uint8_t>(data), stride_a, stride_b};
}

kl::RowScales row_scales(const Scales& scales) {
    return {pointer<const double>(std::get<0>(scales)), std::get<1>(scales)};
}

kl::Units units_of(const Units& units) {
    return {std::get<0>(units), pointer<const double>(std::get<1>(units))};
}

kl::RowPair row_pair(const Pair& of) {
    const auto& [a, b, valid, sizes, formula, beta, wide, scales] = of;
    const auto& [size_a, size_b, columns, threads] = sizes;
    return {logits(a), logits(b),         row_mask(valid), size_a,
            size_b,    columns,           threads,         kl::formula_named(formula.c_str()),
            beta,      row_scales(scales)};
}

kl::Beside beside(const Beside& of) {
    const auto& [of_a, entropies, labels, label_scales, surprises, label_row_scale] = of;
    return {of_a,
            pointer<double>(entropies),
            pointer<const std::int64_t>(labels),
            pointer<const double>(label_scales),
            pointer<double>(surprises),
            pointer<const double>(label_row_scale)};
}

bool is_wide(const Pair& of) { return std::get<6>(of); }

kl::ComplementArgs complement_args(const Complement& of) {
    const auto& [x, valid, sizes, ids, n_ids, scales] = of;
    const auto& [size_a, size_b, columns, threads] = sizes;
    return {logits(x), row_mask(valid),   pointer<const std::int64_t>(ids), n_ids, size_a, size_b, columns,
            threads,   row_scales(scales)};
}

// Whoever takes the tensor over renames the capsule.
constexpr char kUnclaimed[] = "dltensor";

void free_unclaimed(PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, kUnclaimed))
        kl::free_tensor(static_cast<kl::DLManagedTensor*>(PyCapsule_GetPointer(capsule, kUnclaimed)));
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("isa", [] { return std::string(kl::isa()); });
    m.def("supported_isas", [] { return std::string(kl::supported_isas()); });
    m.def("value", [](const Pair& of, Address value, Address stats) {
        nb::gil_scoped_release unlocked;
        kl::value(row_pair(of), is_wide(of), pointer(value), pointer(stats));
    });
    m.def("gradient",
          [](const Pair& of, Address stats, Address row_scale, const Target& to_a, const Target& to_b) {
              nb::gil_scoped_release unlocked;
              kl::gradient(row_pair(of), is_wide(of), pointer(stats), pointer(row_scale), target(to_a),
                           target(to_b));
          });
    m.def("value_and_gradient", [](const Pair& of, Address row_scale, Address value, Address stats,
                                   const Target& to_a, const Target& to_b) {
        nb::gil_scoped_release unlocked;
        kl::value_and_gradient(row_pair(of), is_wide(of), pointer(row_scale), pointer(value), pointer(stats),
                               target(to_a), target(to_b));
    });
    m.def("value_and_beside", [](const Pair& of, const Beside& more, Address value, Address stats) {
        const kl::Beside found = beside(more);
        nb::gil_scoped_release unlocked;
        kl::value(row_pair(of), is_wide(of), pointer(value), pointer(stats), &found);
    });
    m.def("gradient_with_labels", [](const Pair& of, const Beside& more, Address stats, Address row_scale,
                                     const Target& to_a, const Target& to_b) {
        const kl::Beside found = beside(more);
        nb::gil_scoped_release unlocked;
        kl::gradient(row_pair(of), is_wide(of), pointer(stats), pointer(row_scale), target(to_a),
                     target(to_b), &found);
    });
    m.def("value_and_gradient_and_beside",
          [](const Pair& of, const Beside& more, Address row_scale, Address value, Address stats,
             const Target& to_a, const Target& to_b) {
              const kl::Beside found = beside(more);
              nb::gil_scoped_release unlocked;
              kl::value_and_gradient(row_pair(of), is_wide(of), pointer(row_scale), pointer(value),
                                     pointer(stats), target(to_a), target(to_b), &found);
          });
    m.def("formula_sums", [](const Pair& of, Address stats, Address out) {
        nb::gil_scoped_release unlocked;
        kl::formula_sums(row_pair(of), is_wide(of), pointer(stats), pointer<double>(out));
    });
    m.def("token_stats", [](const Pair& of, Address tokens, Address out, Address sums) {
        nb::gil_scoped_release unlocked;
        kl::token_stats(row_pair(of), is_wide(of), pointer<const std::int64_t>(tokens), pointer(out),
                        pointer<double>(sums));
    });
    m.def("complement",
          [](const Complement& of, bool entropy, Address rest_lse, Address rest_entropy, Address stats) {
              nb::gil_scoped_release unlocked;
              kl::complement(complement_args(of), entropy, pointer<double>(rest_lse),
                             pointer<double>(rest_entropy), pointer<double>(stats));
          });
    m.def("complement_gradient", [](const Complement& of, Address stats, Address grad_picked,
                                    Address grad_rest_lse, Address grad_rest_entropy, const Target& to) {
        nb::gil_scoped_release unlocked;
        kl::complement_gradient(complement_args(of), pointer<const double>(stats),
                                pointer<const double>(grad_picked), pointer<const double>(grad_rest_lse),
                                pointer<const double>(grad_rest_entropy), target(to));
    });
    m.def("shard_states", [](Address stats, bool wide, const Units& units, std::int64_t rows,
                             const std::vector<Address>& inside, Address out) {
        std::vector<const void*> values;
        for (const Address value : inside) values.push_back(pointer<const void>(value));
        nb::gil_scoped_release unlocked;
        return kl::shard_states(pointer(stats), wide, units_of(units), rows, values.data(),
                                static_cast<int>(values.size()), pointer<double>(out));
    });
    m.def("merge_shards", [](Address found, std::int64_t shards, std::int64_t rows, int n, Address out) {
        nb::gil_scoped_release unlocked;
        return kl::merge_shards(pointer<const double>(found), shards, rows, n, pointer<double>(out));
    });
    m.def("whole_row_stats",
          [](Address local, bool wide, const Units& units, std::int64_t rows, const char* formula,
             Address log_a, Address ratio, Address numbers, Address out) {
              nb::gil_scoped_release unlocked;
              kl::whole_row_stats(pointer(local), wide, units_of(units), rows, kl::formula_named(formula),
                                  pointer<const double>(log_a), pointer<const double>(ratio),
                                  pointer<const double>(numbers), pointer(out));
          });
    // For the test of their error bounds; testing/probes-inl.h says which is which. n is a multiple of 16.
    m.def("elementary", [](int which, Address x, Address y, std::int64_t n) {
        nb::gil_scoped_release unlocked;
        kl::kernels().elementary(which, pointer<const float>(x), pointer<float>(y), n);
    });
    m.def("slow_rows", [] { return kl::slow_rows.load(); });
    m.def("prefer_huge_pages",
          [](Address data, std::int64_t bytes) { kl::prefer_huge_pages(pointer(data), bytes); });
    // New memory as a DLPack capsule, kept when the last view of it goes.
    m.def("kept_tensor", [](const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
                            int dtype) {
        kl::DLManagedTensor* made = kl::kept_tensor(
            shape.data(), strides.data(), static_cast<int>(shape.size()), static_cast<kl::Dtype>(dtype));
        PyObject* capsule = PyCapsule_New(made, kUnclaimed, free_unclaimed);
        if (capsule == nullptr) kl::free_tensor(made);
        return nb::steal(capsule);
    });
    m.def("limit_idle_bytes", [](std::int64_t bytes) { kl::limit_idle_bytes(bytes); });
    m.def("release_idle_blocks", [] { kl::release_idle_blocks(); });
    m.def("kept_use", [] {
        const kl::KeptUse use = kl::kept_use();
        return std::tuple(use.taken, use.idle, use.idle_blocks);
    });
    // For bench/: what memory gives to code that only reads, or reads and writes.
    m.def("probe_read", [](Address a, Address b, std::int64_t bytes, int threads) {
        nb::gil_scoped_release unlocked;
        return kl::probe_read(pointer(a), pointer(b), bytes, threads);
    });
    m.def("probe_write", [](Address a, Address b, Address to, std::int64_t bytes, int threads) {
        nb::gil_scoped_release unlocked;
        kl::probe_write(pointer(a), pointer(b), pointer(to), bytes, threads);
    });
}
