// HiPPO matrices: online projection of a signal onto a basis as a linear ODE (arXiv 2008.07669, 2206.12037).
//
//   sliding windows and LTI use   x'(t) = A x(t) + B u(t)
//   legs over all history         x'(t) = (A x(t) + B u(t)) / t                         (legs.hpp has its O(N) memory)
//
//   const Hippo legt = hippo_matrix(HippoMeasure::legt, 64);                           // as in s4's hippo.py: window 2
//   const Hippo paper = hippo_matrix(HippoMeasure::legt, 64, {.window = HippoWindow::paper});   // window 1
//   const Hippo lmu = hippo_matrix(HippoMeasure::lmu, 64, {.window = 784});            // any window in units of time
//
//   measure        own window   basis
//   legs           -            Legendre over the whole history, with 1/t; as LTI: Legendre in e^-age
//   legsd          -            the normal part of legs: A = -1/2 I + skew   (S4D-LegS)
//   legt           2            Legendre, sliding window
//   lmu            1            Legendre, scaled and signed otherwise (Legendre memory unit)
//   lagt           -            L_n(age) e^(-age/2)
//   tlagt          -            Laguerre tilted by beta (default 1, the paper's LagT)
//   glagt          -            generalised Laguerre, alpha < 1 (0), beta > 0 (0.01)
//   fourier        2            1, 0, sqrt 2 cos, sqrt 2 sin, ..
//   fourier2       1            the same
//   fourier_decay  -            a decaying window, in the units of time of fourier
//   foud           -            A = -1/2 I + skew, diagonal Fourier
//
// Sources disagree about windows: s4's hippo.py halves legt and fourier (window 2), the paper, hippo-code and most texts
// have window 1 = 2 (A, B).  A window w multiplies (A, B) by own window / w.  Names are also read from text (hippo_measure).
// State index 1 of the Fourier family, the sine of frequency 0, is dead: its row and column of the skew part are zero and A
// is singular, so discretise by discretize.hpp, which needs no inverse.
//
// Low-rank correction P (R x N): A + P^T P = shift I + skew.  R = 2 for legt, 1 for the others (zero for legsd and foud,
// which are normal already); lmu and glagt have none in this basis (R = 0).  nplr.hpp diagonalises with it.  Never diagonalise
// legs itself: its eigenvalues are -1..-N, but the condition of its eigenvectors is 8e10 at N = 16.
//
// Su (kexue.fm 10114) is orthonormal on [-1, 1]: his B is sqrt 2 ours, A equal.  hippo_fourier_history is the matrix of
// kexue.fm 10137: complex Fourier coefficients over the whole history.
//
// All in double: cast the result.  Errors (invalid_argument): states < 1 or above 2^15, odd for the Fourier family, alpha or
// beta outside their ranges or not finite, a window not positive or given to a measure without one, unknown names.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <cmath>
#include <complex>
#include <optional>
#include <string_view>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class HippoMeasure {
  legs,
  legsd,
  legt,
  lmu,
  lagt,
  tlagt,
  glagt,
  fourier,
  fourier2,
  fourier_decay,
  foud
};

/// The two conventions for legt and fourier.
struct HippoWindow {
  static constexpr double s4 = 2;     ///< s4's hippo.py and s4.py, the default here
  static constexpr double paper = 1;  ///< arXiv 2008.07669, hippo-code
};

struct HippoOptions {
  double alpha = 0;                   ///< glagt, < 1
  std::optional<double> beta = {};    ///< tlagt (default 1), glagt (default 0.01), > 0
  std::optional<double> window = {};  ///< length of a sliding window; default: the measure's own
};

/// (A, B) and what makes A normal.
struct Hippo {
  Matrix<double> a;  ///< N x N
  Vector<double> b;  ///< N
  Matrix<double> p;  ///< R x N: A + P^T P = shift I + skew
  double shift = 0;
};

namespace detail {

inline constexpr struct {
  std::string_view name;
  HippoMeasure measure;
} kHippoNames[] = {
    {"legs", HippoMeasure::legs},         {"legsd", HippoMeasure::legsd},
    {"legt", HippoMeasure::legt},         {"lmu", HippoMeasure::lmu},
    {"lagt", HippoMeasure::lagt},         {"tlagt", HippoMeasure::tlagt},
    {"glagt", HippoMeasure::glagt},       {"fourier", HippoMeasure::fourier},
    {"fourier2", HippoMeasure::fourier2}, {"fourier_decay", HippoMeasure::fourier_decay},
    {"foud", HippoMeasure::foud},         {"fout", HippoMeasure::fourier},
    {"fourier_diag", HippoMeasure::foud}};

inline constexpr double kHippoPi = 3.14159265358979323846;
inline constexpr Index kMaxHippoStates = Index{1} << 15;

inline double legendre_norm(Index n) { return std::sqrt(2.0 * static_cast<double>(n) + 1.0); }
inline double sign_of(Index n) { return n % 2 == 0 ? 1.0 : -1.0; }

/// A from its entries; f(n, k) for n rows, k columns.
template <class F>
Matrix<double> matrix_of(Index n, F&& f) {
  Matrix<double> a(n, n);
  for (Index i = 0; i < n; ++i) {
    for (Index k = 0; k < n; ++k) a(i, k) = f(i, k);
  }
  return a;
}

/// B0 = (1, 0, sqrt 2, 0, sqrt 2, 0, ..).
inline Vector<double> fourier_input(Index n) {
  Vector<double> b = Vector<double>::Zero(n);
  for (Index i = 0; i < n; i += 2) b[i] = i == 0 ? 1.0 : std::sqrt(2.0);
  return b;
}

/// decay B0 B0^T off the skew part with frequencies step j.
inline Matrix<double> fourier_transition(Index n, double step, double decay) {
  const Vector<double> b = fourier_input(n);
  Matrix<double> a = matrix_of(n, [&](Index i, Index k) { return -decay * b[i] * b[k]; });
  for (Index j = 0; j < n / 2; ++j) {
    a(2 * j, 2 * j + 1) = -step * static_cast<double>(j);
    a(2 * j + 1, 2 * j) = step * static_cast<double>(j);
  }
  return a;
}

inline Hippo generalised_laguerre(Index n, double alpha, double beta) {
  // log l_i, l_i = sqrt(Gamma(i + alpha + 1) / i!), and log binom(i + alpha, i): both stay finite for every i.
  const auto log_norm = [&](Index i) {
    const double x = static_cast<double>(i);
    return 0.5 * (std::lgamma(x + alpha + 1) - std::lgamma(x + 1));
  };
  Hippo h{.a = matrix_of(n,
                         [&](Index i, Index k) {
                           if (k > i) return 0.0;
                           if (k == i) return -(1 + beta) / 2;
                           return -std::exp(log_norm(k) - log_norm(i));
                         }),
          .b = Vector<double>(n),
          .p = Matrix<double>(0, n),
          .shift = 0};
  const double scale = std::exp(-0.5 * std::lgamma(1 - alpha)) * std::pow(beta, (1 - alpha) / 2);
  double binomial = 1;  // prod_{m <= i} (m + alpha) / m
  for (Index i = 0; i < n; ++i) {
    if (i > 0) binomial *= (static_cast<double>(i) + alpha) / static_cast<double>(i);
    h.b[i] = binomial * std::exp(-log_norm(i)) * scale;
  }
  return h;
}

}  // namespace detail

/// "legs", "legsd", "legt", ..; "fout" is fourier, "fourier_diag" foud.
inline HippoMeasure hippo_measure(std::string_view name) {
  for (const auto& entry : detail::kHippoNames) {
    if (entry.name == name) return entry.measure;
  }
  detail::raise<invalid_argument>("measure (", name, ") must be one of legs, legsd, legt, lmu, ",
                                  "lagt, tlagt, glagt, fourier, fourier2, fourier_decay, foud");
}
inline std::string_view hippo_name(HippoMeasure measure) {
  for (const auto& entry : detail::kHippoNames) {
    if (entry.measure == measure) return entry.name;
  }
  detail::raise<invalid_argument>("measure (", measure, ") is not a HippoMeasure");
}

/// Length of the sliding window that hippo_matrix has by default; infinity where there is no such window.
inline double hippo_window(HippoMeasure measure) {
  switch (measure) {
    case HippoMeasure::legt:
    case HippoMeasure::fourier:
      return HippoWindow::s4;
    case HippoMeasure::lmu:
    case HippoMeasure::fourier2:
      return 1;
    default:
      return HUGE_VAL;
  }
}

inline bool hippo_is_fourier(HippoMeasure measure) {
  return measure == HippoMeasure::fourier || measure == HippoMeasure::fourier2 ||
         measure == HippoMeasure::fourier_decay || measure == HippoMeasure::foud;
}

namespace detail {

inline void require_hippo_states(HippoMeasure measure, Index states) {
  require(states >= 1 && states <= kMaxHippoStates, "states (", states, ") must be in [1, ",
          kMaxHippoStates, "]");
  require(!hippo_is_fourier(measure) || states % 2 == 0, "states (", states,
          ") must be even for measure ", hippo_name(measure));
}

/// B and P of the Legendre measures are rows of r_n.
inline Vector<double> legendre_norms(Index n, double scale) {
  Vector<double> r(n);
  for (Index i = 0; i < n; ++i) r[i] = scale * legendre_norm(i);
  return r;
}

inline Hippo hippo_own_window(HippoMeasure measure, Index n, double alpha,
                              const std::optional<double>& beta_option) {
  const auto rr = [](Index i, Index k) { return legendre_norm(i) * legendre_norm(k); };
  const auto legs = [&](Index i, Index k) {
    if (k > i) return 0.0;
    return k == i ? -static_cast<double>(i + 1) : -rr(i, k);
  };
  Hippo h{.a = {}, .b = {}, .p = Matrix<double>::Zero(1, n), .shift = 0};
  switch (measure) {
    case HippoMeasure::legs:
      h.a = matrix_of(n, legs);
      h.b = legendre_norms(n, 1);
      h.p.row(0) = legendre_norms(n, std::sqrt(0.5));
      h.shift = -0.5;
      break;
    case HippoMeasure::legsd:
      h.a = matrix_of(n, [&](Index i, Index k) {
        return i == k ? -0.5 : (k < i ? -0.5 : 0.5) * rr(i, k);  // the diagonal without rounding
      });
      h.b = legendre_norms(n, 0.5);
      h.shift = -0.5;
      break;
    case HippoMeasure::legt:
      h.a = matrix_of(
          n, [&](Index i, Index k) { return -0.5 * (k > i ? sign_of(k - i) : 1.0) * rr(i, k); });
      h.b = legendre_norms(n, 0.5);
      h.p = Matrix<double>::Zero(2, n);
      for (Index i = 0; i < n; ++i) h.p(i % 2 == 1 ? 0 : 1, i) = std::sqrt(0.5) * legendre_norm(i);
      break;
    case HippoMeasure::lmu:
      h.a = matrix_of(n, [](Index i, Index k) {
        return (k > i ? -1.0 : -sign_of(i - k)) * static_cast<double>(2 * i + 1);
      });
      h.b = Vector<double>(n);
      for (Index i = 0; i < n; ++i) h.b[i] = sign_of(i) * static_cast<double>(2 * i + 1);
      h.p.resize(0, n);
      break;
    case HippoMeasure::lagt:
    case HippoMeasure::tlagt: {
      const double beta = measure == HippoMeasure::lagt ? 1.0 : beta_option.value_or(1.0);
      const double diagonal = measure == HippoMeasure::lagt ? -0.5 : (1 - beta) / 2 - 1;
      h.a = matrix_of(n, [&](Index i, Index k) { return k > i ? 0.0 : k == i ? diagonal : -1.0; });
      h.b = Vector<double>::Constant(n, beta);
      h.p.setConstant(std::sqrt(0.5));
      h.shift = diagonal + 0.5;
      break;
    }
    case HippoMeasure::glagt:
      h = generalised_laguerre(n, alpha, beta_option.value_or(0.01));
      break;
    case HippoMeasure::fourier:
      h.a = fourier_transition(n, kHippoPi, 1);
      h.b = fourier_input(n);
      h.p.row(0) = h.b;
      break;
    case HippoMeasure::fourier2:
      h.a = fourier_transition(n, 2 * kHippoPi, 2);
      h.b = 2 * fourier_input(n);
      h.p.row(0) = std::sqrt(2.0) * fourier_input(n);
      break;
    case HippoMeasure::fourier_decay:
      h.a = fourier_transition(n, kHippoPi, 0.5);
      h.b = 0.5 * fourier_input(n);
      h.p.row(0) = std::sqrt(0.5) * fourier_input(n);
      break;
    case HippoMeasure::foud:
      h.a = fourier_transition(n, 2 * kHippoPi, 0);
      h.a.diagonal().setConstant(-0.5);
      h.b = fourier_input(n);
      h.shift = -0.5;
      break;
  }
  return h;
}

}  // namespace detail

/// The transition of a measure with `states` coefficients.
inline Hippo hippo_matrix(HippoMeasure measure, Index states, const HippoOptions& options = {}) {
  const std::string_view name = hippo_name(measure);
  detail::require_hippo_states(measure, states);
  detail::require(options.alpha < 1 && std::isfinite(options.alpha), "alpha (", options.alpha,
                  ") must be finite and below 1");
  // Gamma(alpha + 1) of the basis' norms.
  detail::require(options.alpha > -1, "alpha (", options.alpha, ") must be above -1");
  if (options.beta) {
    detail::require(*options.beta > 0 && std::isfinite(*options.beta), "beta (", *options.beta,
                    ") must be positive and finite");
  }
  const double own = hippo_window(measure);
  double scale = 1;
  if (options.window) {
    detail::require(std::isfinite(own), "window (", *options.window, ") is given, but measure ",
                    name, " has no sliding window");
    detail::require(*options.window > 0 && std::isfinite(*options.window), "window (",
                    *options.window, ") must be positive and finite");
    scale = own / *options.window;
  }
  Hippo h = detail::hippo_own_window(measure, states, options.alpha, options.beta);
  if (scale != 1) {
    h.a *= scale;
    h.b *= scale;
    h.p *= std::sqrt(scale);
    h.shift *= scale;
  }
  return h;
}

/// x' = (A x + B u)/t of the complex Fourier coefficients c_n = int_0^1 u(st) e^(-2 pi i n s) ds, |n| <= order, over the whole
/// history; row order + n is n, B is all ones.  Cut off at |n| <= order, it is not exact (kexue.fm 10137).
inline Matrix<std::complex<double>> hippo_fourier_history(Index order) {
  detail::require(order >= 0 && order < detail::kMaxHippoStates / 2, "order (", order,
                  ") must be in [0, ", detail::kMaxHippoStates / 2, ")");
  Matrix<std::complex<double>> a(2 * order + 1, 2 * order + 1);
  for (Index n = -order; n <= order; ++n) {
    for (Index k = -order; k <= order; ++k) {
      const double x = static_cast<double>(n);
      a(order + n, order + k) = n == k ? std::complex<double>(-1, detail::kHippoPi * x)
                                       : std::complex<double>(-x / static_cast<double>(n - k), 0);
    }
  }
  return a;
}

EIGENBLOCKS_NAMESPACE_END
