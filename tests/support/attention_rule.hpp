// Any mask and any score functor as one type each, so that a whole test program shares a few instantiations of the kernels.
//
//   const AnyRule rule{eb::causal() & eb::window_left(3), eb::soft_cap(2.0)};
//   rule.visit([](const auto& concrete) { ... });      // concrete: eb::AttentionRule<AnyMask, ...>
//
// A rule without score functor stays eb::IdentityScore, because the kernels take another numeric path for it.
#pragma once

#include <eigenblocks/attention/rule.hpp>

#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

namespace attention_test {

namespace eb = eigenblocks;
using eb::Index;

/// A mask behind virtual calls, with all optional members.
class AnyMask : public eb::detail::MaskTag {
 public:
  AnyMask() : AnyMask(eb::full()) {}
  template <eb::Mask M>
    requires(!std::is_same_v<M, AnyMask>)
  AnyMask(M mask)  // NOLINT: implicit by design
      : mask_(std::make_shared<Model<decltype(eb::detail::as_mask(mask))>>(
            eb::detail::as_mask(mask))) {}

  bool operator()(Index i, Index j, Index h) const { return mask_->keep(i, j, h); }
  eb::TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return mask_->classify(i0, i1, j0, j1);
  }
  eb::KeyRange key_range(Index i0, Index i1) const { return mask_->key_range(i0, i1); }
  template <class P>
  P lanes(const P& irel, Index i0, Index j, Index h) const {
    P keep = irel;
    mask_->lanes(keep, i0, j, h);
    return keep;
  }

 private:
  using Floats = eb::simd::Packet<float>;
  using Doubles = eb::simd::Packet<double>;
  struct Interface {
    virtual ~Interface() = default;
    virtual bool keep(Index i, Index j, Index h) const = 0;
    virtual eb::TileClass classify(Index i0, Index i1, Index j0, Index j1) const = 0;
    virtual eb::KeyRange key_range(Index i0, Index i1) const = 0;
    virtual void lanes(Floats& irel, Index i0, Index j, Index h) const = 0;
    virtual void lanes(Doubles& irel, Index i0, Index j, Index h) const = 0;
  };
  template <class M>
  struct Model final : Interface {
    M mask;
    explicit Model(M m) : mask(std::move(m)) {}
    bool keep(Index i, Index j, Index h) const override { return mask(i, j, h); }
    eb::TileClass classify(Index i0, Index i1, Index j0, Index j1) const override {
      return eb::detail::classify(mask, i0, i1, j0, j1);
    }
    eb::KeyRange key_range(Index i0, Index i1) const override {
      return eb::detail::key_range(mask, i0, i1);
    }
    void lanes(Floats& irel, Index i0, Index j, Index h) const override {
      evaluate(irel, i0, j, h);
    }
    void lanes(Doubles& irel, Index i0, Index j, Index h) const override {
      evaluate(irel, i0, j, h);
    }
    template <class P>
    void evaluate(P& irel, Index i0, Index j, Index h) const {
      eb::simd::lane_t<P> first[std::size_t(eb::simd::kPacketSize<P>)];
      eb::simd::store<P>(first, irel);
      irel = eb::detail::mask_lanes<P>(mask, irel, i0, static_cast<Index>(first[0]),
                                       std::numeric_limits<Index>::max(), j, h);
    }
  };
  std::shared_ptr<const Interface> mask_;
};

/// A score functor behind virtual calls, with all optional members but `accumulate` and the compile-time flags.
class AnyScore {
 public:
  template <eb::Score F>
    requires(!std::is_same_v<F, AnyScore>)
  AnyScore(F score)  // NOLINT: implicit by design
      : score_(std::make_shared<Model<F>>(std::move(score))) {}

  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return score_->value(s, i, j, h);
  }
  template <class S>
  S grad(S s, Index i, Index j, Index h) const {
    return score_->grad(s, i, j, h);
  }
  template <class P>
  P lanes(P s, const P& irel, Index i0, Index j, Index h) const {
    score_->lanes(s, irel, i0, j, h);
    return s;
  }
  template <class P>
  P grad_lanes(P s, const P& irel, Index i0, Index j, Index h) const {
    score_->grad_lanes(s, irel, i0, j, h);
    return s;
  }

 private:
  using Floats = eb::simd::Packet<float>;
  using Doubles = eb::simd::Packet<double>;
  struct Interface {
    virtual ~Interface() = default;
    virtual float value(float s, Index i, Index j, Index h) const = 0;
    virtual double value(double s, Index i, Index j, Index h) const = 0;
    virtual float grad(float s, Index i, Index j, Index h) const = 0;
    virtual double grad(double s, Index i, Index j, Index h) const = 0;
    virtual void lanes(Floats& s, const Floats& irel, Index i0, Index j, Index h) const = 0;
    virtual void lanes(Doubles& s, const Doubles& irel, Index i0, Index j, Index h) const = 0;
    virtual void grad_lanes(Floats& s, const Floats& irel, Index i0, Index j, Index h) const = 0;
    virtual void grad_lanes(Doubles& s, const Doubles& irel, Index i0, Index j, Index h) const = 0;
  };
  template <class F>
  struct Model final : Interface {
    F f;
    explicit Model(F score) : f(std::move(score)) {}
    float value(float s, Index i, Index j, Index h) const override { return f(s, i, j, h); }
    double value(double s, Index i, Index j, Index h) const override { return f(s, i, j, h); }
    float grad(float s, Index i, Index j, Index h) const override {
      return eb::detail::score_grad(f, s, i, j, h);
    }
    double grad(double s, Index i, Index j, Index h) const override {
      return eb::detail::score_grad(f, s, i, j, h);
    }
    void lanes(Floats& s, const Floats& irel, Index i0, Index j, Index h) const override {
      s = eb::detail::score_lanes<Floats>(f, s, irel, i0, first(irel), kLast, j, h);
    }
    void lanes(Doubles& s, const Doubles& irel, Index i0, Index j, Index h) const override {
      s = eb::detail::score_lanes<Doubles>(f, s, irel, i0, first(irel), kLast, j, h);
    }
    void grad_lanes(Floats& s, const Floats& irel, Index i0, Index j, Index h) const override {
      s = eb::detail::score_grad_lanes<Floats>(f, s, irel, i0, first(irel), kLast, j, h);
    }
    void grad_lanes(Doubles& s, const Doubles& irel, Index i0, Index j, Index h) const override {
      s = eb::detail::score_grad_lanes<Doubles>(f, s, irel, i0, first(irel), kLast, j, h);
    }
    static constexpr Index kLast = std::numeric_limits<Index>::max();
    template <class P>
    static Index first(const P& irel) {
      eb::simd::lane_t<P> lanes[std::size_t(eb::simd::kPacketSize<P>)];
      eb::simd::store<P>(lanes, irel);
      return static_cast<Index>(lanes[0]);
    }
  };
  std::shared_ptr<const Interface> score_;
};

struct AnyRule {
  AnyMask mask;
  std::optional<AnyScore> score = std::nullopt;

  template <class F>
  auto visit(F&& f) const {
    return score ? f(eb::attention_rule(mask, *score)) : f(eb::attention_rule(mask));
  }
};

}  // namespace attention_test
