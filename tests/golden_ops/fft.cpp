// Golden ops rfft (real, and as a complex transform) and causal_conv (every method).
#include "support/golden.hpp"

#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/fft.hpp>

#include <algorithm>
#include <complex>
#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

template <class C, class M>
void compare_complex(C& c, const std::string& name, const M& got) {
  using S = golden::scalar_of<C>;
  c.expect(name + "_re", Matrix<S>(got.real()));
  c.expect(name + "_im", Matrix<S>(got.imag()));
}

struct RfftOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    using Complex = Matrix<std::complex<S>>;
    const Matrix<S> x = c.matrix("in.x");
    const Index n = c.param_int("n"), channels = x.cols();
    const eb::RealFft<S> plan(n);
    c.form("real");
    Complex spectrum(plan.spectrum_rows(), channels);
    Matrix<S> back(n, channels);
    eb::rfft(plan, x, spectrum);
    eb::irfft(plan, spectrum, back);
    compare_complex(c, "out.X", spectrum);
    c.expect("out.xr", back);
    if (c.has("gout.X_re") || c.has("gout.xr")) backward(c, plan, x);

    c.form("complex");
    const eb::ComplexFft<S> all(n);
    Complex z = Complex::Zero(n, channels);
    z.topRows(std::min(n, x.rows())).real() = x.topRows(std::min(n, x.rows()));
    eb::fft(all, z, z);
    compare_complex(c, "out.X", Complex(z.topRows(n / 2 + 1)));
    eb::ifft(all, z, z);
    c.expect("out.xr", Matrix<S>(z.real()));
  }

  template <class C, class S>
  void backward(C& c, const eb::RealFft<S>& plan, const Matrix<S>& x) const {
    Matrix<std::complex<S>> upstream(plan.spectrum_rows(), x.cols()), more = upstream;
    upstream.setZero();
    if (c.has("gout.X_re")) {
      upstream.real() = c.matrix("gout.X_re");
      upstream.imag() = c.matrix("gout.X_im");
    }
    if (c.has("gout.xr")) {
      eb::irfft_backward(plan, c.matrix("gout.xr"), more);
      upstream += more;
    }
    Matrix<S> dx(x.rows(), x.cols());
    eb::rfft_backward(plan, upstream, dx);
    c.expect("gin.x", dx);
  }
};

struct CausalConvOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> u = c.matrix("in.u"), k = c.matrix("in.k");
    const Vector<S> skip = c.vector("in.D");
    const Index taps = std::min(u.rows(), k.rows());
    const auto run = [&](const std::string& name, const eb::CausalConvOptions& options) {
      c.form(name);
      Matrix<S> y(u.rows(), u.cols()), du = y, dk(k.rows(), k.cols());
      Vector<S> dskip(skip.size());
      eb::CausalConvSaved<S> saved;
      eb::causal_conv_forward(saved, u, k, y, skip, options);
      c.expect("out.y", y);
      eb::causal_conv(u, k, y, skip, options);
      c.expect("out.y", y);
      if (!c.has("gout.y")) return;
      eb::causal_conv_backward(saved, u, k, c.matrix("gout.y"), du, dk, dskip, skip);
      c.expect("gin.u", du);
      c.expect("gin.k", dk);
      c.expect("gin.D", dskip);
    };
    run("automatic", {});
    run("direct", {.method = eb::ConvMethod::direct});
    run("fft", {.method = eb::ConvMethod::fft});
    run("overlap_save", {.method = eb::ConvMethod::overlap_save});
    Index block = 2;
    while (block < 2 * taps) block *= 2;
    run("overlap_save, short", {.method = eb::ConvMethod::overlap_save, .block = block});
    run("overlap_save, long", {.method = eb::ConvMethod::overlap_save, .block = 8 * block});
  }
};

}  // namespace

void register_fft(golden::Registry& registry) {
  constexpr auto kNorm = golden::Compare::max_norm;
  registry.add("rfft", RfftOp{}, kNorm);
  registry.add("causal_conv", CausalConvOp{}, kNorm);
}
