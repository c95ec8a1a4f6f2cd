// What the sanitizers run: every formula and format, odd sizes in buffers without a byte to spare, special
// numbers, one thread and many. Exits with 1 where two thread counts disagree in a bit; the sanitizers see to
// the rest.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "api.h"
#include "complement/complement.h"
#include "runtime/kept_memory.h"
#include "shards/merge.h"

namespace {

using Bytes = std::vector<unsigned char>;

template <class T>
void append(Bytes& to, const std::vector<T>& x) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(x.data());
    to.insert(to.end(), bytes, bytes + x.size() * sizeof(T));
}

// Any bits at all in every other row, small numbers in the rest.
Bytes logits(kl::Dtype dtype, std::int64_t rows, std::int64_t columns, unsigned seed) {
    std::mt19937 random(seed);
    const std::int64_t size = size_of(dtype);
    Bytes out(static_cast<std::size_t>(rows * columns * size));
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        std::uint64_t bits = (static_cast<std::uint64_t>(random()) << 32) | random();
        if (i / columns % 2 == 0) {
            const float x = static_cast<float>(static_cast<int>(random() % 2048) - 1024) / 128;
            const double wide = static_cast<double>(x);
            std::uint32_t narrow;
            std::memcpy(&narrow, &x, 4);
            if (dtype == kl::Dtype::f64) std::memcpy(&bits, &wide, 8);
            if (dtype == kl::Dtype::f32) bits = narrow;
            if (dtype == kl::Dtype::bf16) bits = narrow >> 16;
            if (dtype == kl::Dtype::f16) bits = (bits & 0x83ffu) | 0x3c00u;
        }
        std::memcpy(out.data() + i * size, &bits, static_cast<std::size_t>(size));
    }
    return out;
}

// All results, byte by byte.
Bytes run(kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns, int threads, bool fused,
          kl::Formula formula) {
    const Bytes left = logits(a, rows, columns, 1), right = logits(b, rows, columns, 2);
    const auto n = static_cast<std::size_t>(rows);
    std::vector<std::uint8_t> mask(n);
    std::vector<std::int64_t> tokens(n);
    for (std::size_t i = 0; i < n; ++i) {
        mask[i] = i % 5 != 3;
        tokens[i] = i % 2 == 0 ? columns - 1 : -1;
    }
    const bool wide = a == kl::Dtype::f64 || b == kl::Dtype::f64;
    const kl::Logits x{left.data(), columns, columns, a, 1.0};
    const kl::Logits y{right.data(), columns, columns, b, columns % 2 == 0 ? 1.0 : 0.5};
    const kl::RowPair p{x, y, {mask.data(), 1, 1}, rows, 1, columns, threads, formula, 0.3};
    std::vector<double> value(n), alone(n), stats(n * kl::kStats), token_stats(n * kl::kTokenStats),
        sums(3 * n);
    const std::vector<double> wide_scale(n, 0.5);
    const std::vector<float> scale(n, 0.5f);
    const void* row_scale = wide ? static_cast<const void*>(wide_scale.data()) : scale.data();
    Bytes grad_a(left.size()), grad_b(right.size()), out;
    const kl::Gradient to_a{grad_a.data(), columns, columns, a}, to_b{grad_b.data(), columns, columns, b};
    if (formula == kl::Formula::kl) kl::token_stats(p, wide, tokens.data(), token_stats.data(), sums.data());
    kl::value(p, wide, alone.data(), nullptr);
    std::vector<double> entropies(n), surprises(n);
    const std::vector<double> factors(n, 0.25);
    const kl::Beside beside{rows % 2 == 0, entropies.data(), tokens.data(),
                            nullptr,       surprises.data(), factors.data()};
    const bool asks = columns % 3 == 0 || (rows == 2 && a == kl::Dtype::bf16);
    const kl::Beside* const more = asks ? &beside : nullptr;
    if (fused) {
        kl::value_and_gradient(p, wide, row_scale, value.data(), stats.data(), to_a, to_b, more);
    } else {
        kl::value(p, wide, value.data(), stats.data(), more);
        kl::gradient(p, wide, stats.data(), row_scale, to_a, to_b, more);
    }
    for (const auto& numbers : {value, token_stats, sums, entropies, surprises}) append(out, numbers);
    for (const auto& grad : {grad_a, grad_b}) append(out, grad);
    // A value that depends on whether the stats were asked for makes the two runs differ.
    if (std::memcmp(value.data(), alone.data(), n * sizeof(double)) != 0) out.push_back(fused);
    return out;
}

// What lies outside some columns, among them the first, the last, one twice, and ids that name none.
Bytes run_complement(kl::Dtype dtype, std::int64_t rows, std::int64_t columns, int threads) {
    const Bytes x = logits(dtype, rows, columns, 3);
    const std::int64_t k = 7;
    std::vector<std::int64_t> ids;
    for (std::int64_t r = 0; r < rows; ++r)
        for (const std::int64_t id :
             {std::int64_t{0}, columns - 1, columns / 2, columns / 2, std::int64_t{-1}, columns, INT64_MAX})
            ids.push_back(id);
    const kl::ComplementArgs p{
        {x.data(), columns, columns, dtype, 0.7}, {nullptr, 0, 0}, ids.data(), k, rows, 1, columns, threads};
    const auto n = static_cast<std::size_t>(rows);
    std::vector<double> rest_lse(n), rest_entropy(n), stats(n * kl::kComplementStats), flow(n, 0.25),
        grad_picked(n * k, 0.5);
    Bytes grad(x.size());
    kl::complement(p, true, rest_lse.data(), rest_entropy.data(), stats.data());
    kl::complement_gradient(p, stats.data(), grad_picked.data(), flow.data(), flow.data(),
                            {grad.data(), columns, columns, dtype});
    append(grad, rest_lse);
    return grad;
}

// Two shards of a row that are its two halves, from their stats to the whole rows', any bits among them.
void merge_halves(bool wide, kl::Dtype dtype, std::int64_t rows, std::int64_t columns) {
    const Bytes a = logits(dtype, rows, 2 * columns, 5), b = logits(dtype, rows, 2 * columns, 6);
    const auto n = static_cast<std::size_t>(rows);
    const kl::Units units{0.7, nullptr};
    std::vector<double> found(2 * 4 * n), whole(4 * n), sums(3 * n, 0.5), out(n * kl::kStats);
    std::vector<double> value(n), stats(n * kl::kStats);
    for (std::size_t half = 0; half < 2; ++half) {
        const std::int64_t first = static_cast<std::int64_t>(half) * columns * size_of(dtype);
        const kl::Logits x{a.data() + first, 2 * columns, 2 * columns, dtype, 1.0},
            y{b.data() + first, 2 * columns, 2 * columns, dtype, 1.0};
        const kl::RowPair p{x, y, {nullptr, 0, 0}, rows, 1, columns, 1, kl::Formula::kl, 0.0};
        kl::value(p, wide, value.data(), stats.data());
        const void* const inside[] = {value.data(), value.data()};
        kl::shard_states(stats.data(), wide, units, rows, inside, 2, found.data() + half * 4 * n);
    }
    kl::merge_shards(found.data(), 2, rows, 2, whole.data());
    kl::whole_row_stats(stats.data(), wide, units, rows, kl::Formula::kl, whole.data(), whole.data() + n,
                        sums.data(), out.data());
}

// Blocks that come and go in several threads: whether what one of them wrote was found changed by another.
bool share_a_block() {
    std::atomic<bool> shared{false};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&, i] {
            kl::KeptBlock* held = nullptr;
            for (std::int64_t step = 0; step < 200; ++step) {
                kl::KeptBlock* block = kl::take_block((2 + (step * 7 + i) % 5) << 20);
                auto* data = static_cast<std::int64_t*>(block->data);
                const std::int64_t n = block->bytes / 8;
                for (std::int64_t j = 0; j < n; j += 511) data[j] = i;
                for (std::int64_t j = 0; j < n; j += 511) shared = shared || data[j] != i;
                if (held != nullptr) kl::give_back(held);
                held = block;
                if (step % 50 == i) kl::release_idle_blocks();
            }
            kl::give_back(held);
        });
    for (std::thread& t : callers) t.join();
    const kl::KeptUse use = kl::kept_use();
    return shared || use.taken != 0 || use.idle_blocks > 2;
}

}  // namespace

int main() {
    const kl::Dtype dtypes[] = {kl::Dtype::f32, kl::Dtype::bf16, kl::Dtype::f16, kl::Dtype::f64};
    std::atomic<int> wrong{0};
    const auto check_formula = [&](kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns,
                                   const char* name) {
        const kl::Formula formula = kl::formula_named(name);
        if (run(a, b, rows, columns, 1, false, formula) == run(a, b, rows, columns, 4, true, formula)) return;
        ++wrong;
        std::printf("%s, dtypes %d and %d, %lld x %lld: the bits depend on the threads\n", name,
                    static_cast<int>(a), static_cast<int>(b), static_cast<long long>(rows),
                    static_cast<long long>(columns));
    };
    const auto check = [&](kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns) {
        check_formula(a, b, rows, columns, "kl");
#define X(name) check_formula(a, b, rows, columns, #name);
        KL_FORMULAS(X)
#undef X
    };
    for (const kl::Dtype a : dtypes)
        for (const kl::Dtype b : dtypes)
            for (const std::int64_t columns : {1, 2, 15, 33, 127, 2049, 4100}) check(a, b, 7, columns);
    for (const kl::Dtype a : {kl::Dtype::f32, kl::Dtype::bf16}) check(a, a, 2, 70001);

    const auto check_complement = [&](kl::Dtype dtype, std::int64_t rows, std::int64_t columns) {
        if (run_complement(dtype, rows, columns, 1) == run_complement(dtype, rows, columns, 4)) return;
        ++wrong;
        std::printf("complement, dtype %d, %lld x %lld: the bits depend on the threads\n",
                    static_cast<int>(dtype), static_cast<long long>(rows), static_cast<long long>(columns));
    };
    for (const kl::Dtype dtype : dtypes) {
        for (const std::int64_t columns : {1, 2, 15, 33, 127, 2049, 4100})
            check_complement(dtype, 7, columns);
        check_complement(dtype, 2, 70001);
    }

    merge_halves(false, kl::Dtype::f32, 9, 33);
    merge_halves(true, kl::Dtype::f64, 9, 33);

    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&] { check(kl::Dtype::f32, kl::Dtype::f32, 40, 5003); });
    for (std::thread& t : callers) t.join();
    if (share_a_block()) {
        ++wrong;
        std::printf("kept memory: a block was in two hands, or too many lie idle\n");
    }
    std::printf("%s: %s\n", kl::isa(), wrong == 0 ? "clean" : "WRONG");
    return wrong == 0 ? 0 : 1;
}
