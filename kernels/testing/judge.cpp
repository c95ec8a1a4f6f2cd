// Runs recorded cases and compares every number with what a file says it is, to within what the file says it
// may be off: for processors that Python is not at hand for. tests/reference_vectors.py writes the file.
//
//     kl_judge FILE
//
// A file is cases one after another: a Header, what the case's run_ function reads, as many expected numbers
// as it returns, and as many bounds, in this processor's byte order. NaN and infinities must be where they
// are expected, and no divergence may be negative.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "complement/complement.h"
#include "runtime/dispatch.h"

namespace {

struct Header {
    char what[16], formula[16];
    std::int64_t dtype_a, dtype_b, rows, columns, n;
    double scale_a, scale_b, beta;
};

using Bytes = std::vector<unsigned char>;
using Numbers = std::vector<double>;

class Input {
public:
    explicit Input(const char* path) : file_(std::fopen(path, "rb")) {}
    Input(const Input&) = delete;
    Input& operator=(const Input&) = delete;
    ~Input() {
        if (file_ != nullptr) std::fclose(file_);
    }
    bool is_open() const { return file_ != nullptr; }
    bool next(Header& header) { return std::fread(&header, sizeof header, 1, file_) == 1; }
    template <class T>
    std::vector<T> read(std::int64_t n) {
        std::vector<T> x(static_cast<std::size_t>(n));
        if (std::fread(x.data(), sizeof(T), x.size(), file_) != x.size()) complete_ = false;
        return x;
    }
    bool is_complete() const { return complete_; }

private:
    std::FILE* file_;
    bool complete_ = true;
};

kl::Dtype dtype_of(std::int64_t number) { return static_cast<kl::Dtype>(number); }

void append(Numbers& to, const Numbers& x) { to.insert(to.end(), x.begin(), x.end()); }

double widened(const unsigned char* at, kl::Dtype dtype) {
    if (dtype == kl::Dtype::f64) {
        double x;
        std::memcpy(&x, at, sizeof x);
        return x;
    }
    std::uint32_t bits = 0;
    std::memcpy(&bits, at, static_cast<std::size_t>(size_of(dtype)));
    if (dtype == kl::Dtype::f16) {  // not by what is judged here
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        const double size = exponent == 31  ? (fraction != 0 ? std::nan("") : INFINITY)
                            : exponent == 0 ? std::ldexp(fraction, -24)
                                            : std::ldexp(1024 + fraction, exponent - 25);
        return (bits & 0x8000u) != 0 ? -size : size;
    }
    if (dtype == kl::Dtype::bf16) bits <<= 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return static_cast<double>(x);
}

Numbers widened(const Bytes& from, kl::Dtype dtype) {
    const auto size = static_cast<std::size_t>(size_of(dtype));
    Numbers out;
    for (std::size_t i = 0; i < from.size(); i += size) out.push_back(widened(from.data() + i, dtype));
    return out;
}

Numbers widened(const std::vector<float>& x) { return {x.begin(), x.end()}; }

struct Sides {
    Bytes a, b;
    kl::RowPair pair;
    bool wide;  // results in fp64

    Sides(Input& in, const Header& h)
        : a(in.read<unsigned char>(h.rows * h.columns * size_of(dtype_of(h.dtype_a)))),
          b(in.read<unsigned char>(h.rows * h.columns * size_of(dtype_of(h.dtype_b)))),
          pair{{a.data(), h.columns, h.columns, dtype_of(h.dtype_a), h.scale_a},
               {b.data(), h.columns, h.columns, dtype_of(h.dtype_b), h.scale_b},
               {nullptr, 0, 0},
               h.rows,
               1,
               h.columns,
               1,
               kl::formula_named(h.formula),
               h.beta},
          wide(pair.a.dtype == kl::Dtype::f64 || pair.b.dtype == kl::Dtype::f64) {}
};

// Logits of a and of b, row_scale [rows]; value [rows], both gradients [rows, columns].
Numbers run_pair(Input& in, const Header& h) {
    Sides sides(in, h);
    const auto row_scale = in.read<double>(h.rows);
    const auto n = static_cast<std::size_t>(h.rows);
    Bytes grad_a(sides.a.size()), grad_b(sides.b.size());
    const kl::Gradient to_a{grad_a.data(), h.columns, h.columns, sides.pair.a.dtype},
        to_b{grad_b.data(), h.columns, h.columns, sides.pair.b.dtype};
    Numbers out;
    const auto run = [&]<class R>(std::vector<R> value) {
        std::vector<R> stats(n * kl::kStats), scale(row_scale.begin(), row_scale.end());
        kl::value(sides.pair, sides.wide, value.data(), stats.data());
        kl::gradient(sides.pair, sides.wide, stats.data(), scale.data(), to_a, to_b);
        for (const R x : value) out.push_back(x < 0 ? std::nan("negative") : static_cast<double>(x));
    };
    if (sides.wide)
        run(std::vector<double>(n));
    else
        run(std::vector<float>(n));
    append(out, widened(grad_a, sides.pair.a.dtype));
    append(out, widened(grad_b, sides.pair.b.dtype));
    return out;
}

// Logits of a and of b, int64 tokens [rows]; [kTokenStats, rows], and [3, rows] of the comparison.
Numbers run_stats(Input& in, const Header& h) {
    Sides sides(in, h);
    const auto tokens = in.read<std::int64_t>(h.rows);
    const auto n = static_cast<std::size_t>(h.rows * kl::kTokenStats);
    Numbers wide(n);
    std::vector<float> narrow(n);
    Numbers out, comparison(static_cast<std::size_t>(3 * h.rows));
    void* const fields = sides.wide ? static_cast<void*>(wide.data()) : narrow.data();
    kl::token_stats(sides.pair, sides.wide, tokens.data(), fields, comparison.data());
    out = sides.wide ? wide : widened(narrow);
    append(out, comparison);
    return out;
}

// Logits, int64 ids [rows, n], grad_picked [rows, n], grad_rest_lse and grad_rest_entropy [rows]; rest_lse
// and rest_entropy [rows], gradient [rows, columns].
Numbers run_rest(Input& in, const Header& h) {
    const kl::Dtype dtype = dtype_of(h.dtype_a);
    const auto x = in.read<unsigned char>(h.rows * h.columns * size_of(dtype));
    const auto ids = in.read<std::int64_t>(h.rows * h.n);
    const auto picked = in.read<double>(h.rows * h.n), to_lse = in.read<double>(h.rows),
               to_entropy = in.read<double>(h.rows);
    const kl::ComplementArgs args{{x.data(), h.columns, h.columns, dtype, h.scale_a},
                                  {nullptr, 0, 0},
                                  ids.data(),
                                  h.n,
                                  h.rows,
                                  1,
                                  h.columns,
                                  1};
    const auto n = static_cast<std::size_t>(h.rows);
    Numbers lse(n), entropy(n), stats(n * kl::kComplementStats);
    Bytes grad(x.size());
    kl::complement(args, true, lse.data(), entropy.data(), stats.data());
    kl::complement_gradient(args, stats.data(), picked.data(), to_lse.data(), to_entropy.data(),
                            {grad.data(), h.columns, h.columns, dtype});
    append(lse, entropy);
    append(lse, widened(grad, dtype));
    return lse;
}

// fp32 [columns], n being the function's number; [columns].
Numbers run_function(Input& in, const Header& h) {
    const auto x = in.read<float>(h.columns);
    std::vector<float> y(x.size());
    kl::kernels().elementary(static_cast<int>(h.n), x.data(), y.data(), h.columns);
    return widened(y);
}

Numbers run(Input& in, const Header& h) {
    const std::string what = h.what;
    if (what == "pair") return run_pair(in, h);
    if (what == "stats") return run_stats(in, h);
    if (what == "rest") return run_rest(in, h);
    return run_function(in, h);
}

// How many times the bound a number is off; infinite where it is of another kind.
double excess(double x, double expected, double bound) {
    if (std::isnan(x) || std::isnan(expected) || std::isinf(expected))
        return (std::isnan(x) && std::isnan(expected)) || x == expected ? 0 : INFINITY;
    const double error = std::fabs(x - expected);
    return error <= bound ? (bound > 0 ? error / bound : 0) : bound > 0 ? error / bound : INFINITY;
}

}  // namespace

int main(int argc, char** argv) {
    Input in(argc == 2 ? argv[1] : "");
    if (!in.is_open()) {
        std::printf("usage: kl_judge FILE\n");
        return 2;
    }
    Header h;
    std::int64_t cases = 0, numbers = 0, wrong = 0;
    double worst = 0;
    for (; in.next(h); ++cases) {
        const Numbers found = run(in, h);
        const auto n = static_cast<std::int64_t>(found.size());
        const Numbers expected = in.read<double>(n), bounds = in.read<double>(n);
        std::int64_t wrong_here = 0;
        for (std::size_t i = 0; i < found.size(); ++i) {
            const double times = excess(found[i], expected[i], bounds[i]);
            if (times <= 1) {
                worst = std::fmax(worst, times);
            } else if (wrong_here++ == 0) {
                std::printf(
                    "case %lld: %s %s, dtypes %lld and %lld, %lld x %lld, n %lld: number %zu is %.9g and "
                    "should be %.9g within %.3g\n",
                    static_cast<long long>(cases), h.what, h.formula, static_cast<long long>(h.dtype_a),
                    static_cast<long long>(h.dtype_b), static_cast<long long>(h.rows),
                    static_cast<long long>(h.columns), static_cast<long long>(h.n), i, found[i], expected[i],
                    bounds[i]);
            }
        }
        wrong += wrong_here;
        numbers += n;
    }
    if (!in.is_complete()) std::printf("the file ends within a case\n");
    std::printf("%s: %lld cases, %lld numbers, %lld wrong, the rest within %.3f of their bounds\n", kl::isa(),
                static_cast<long long>(cases), static_cast<long long>(numbers), static_cast<long long>(wrong),
                worst);
    return wrong == 0 && cases > 0 && in.is_complete() ? 0 : 1;
}
