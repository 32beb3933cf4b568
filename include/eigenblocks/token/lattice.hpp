// All segmentations of a text under a unigram model at once: sums, marginals, entropy, and their gradients.
//
//   const UnigramWeights weights(model, alpha);          // P(y) = exp(alpha S(y)) / Z over the segmentations y of the text
//   Lattice lattice;                                     // owns the tables: nothing is allocated once they have grown
//   lattice.run(weights, text);                          // log Z; keeps references to both
//   lattice.boundary(i);                                 // P(a piece ends at byte i)
//   lattice.edges([](size_t begin, size_t end, uint32_t piece, double marginal) { ... });
//   lattice.add_expected_counts(counts);                 // counts[p] += E[number of times piece p is used]
//   const ScoreMoments m = lattice.moments();            // E[S], Var[S] and the entropy of P, in nats
//   LatticeGrad grad{g_theta};                           // size() entries, and .alpha: gradients are added
//   lattice.add_log_partition_grad(upstream, grad);      // also add_log_prob_grad, add_score_mean_grad, add_entropy_grad
//
//   lattice.run_counts(weights, text, f, counts);        // log Z, and counts += f E[counts]: one pass less than the two calls
//   lattice_expected_counts(weights, texts, f, counts, pool);          // sum of f log Z over texts, and all their counts
//
// alpha = 0: uniform over segmentations; 1: the model; towards infinity: Viterbi.  For theta = logits - log sum exp(logits),
// unigram_theta_backward carries a gradient on to the logits.
//
//   log Z = F[n]       marginal of an edge = F[s] w B[e] / Z       H = log Z - alpha E[S]
//   d log Z = alpha c . d theta + E[S] d alpha                     c: expected counts
//   d E[S]  = (c + alpha q) . d theta + Var[S] d alpha             q_p: sum over edges with p of m_e (theta_p + FS[s] + BS[e] - E[S])
//   d H     = -alpha^2 q . d theta - alpha Var[S] d alpha          FS, BS: mean scores of what is before, after
//
// O(edges) time, 32 bytes per byte of text (48 for moments and their gradients); edges are walked anew, not stored.  log Z has
// a relative error of about 1e-15 (unless its terms cancel), H is cut off at 0.  Texts are independent: log Z, H, counts add up.
// Errors: data_error for a text without a segmentation; invalid_argument for a span of the wrong size, for pieces that are
// not a segmentation of the text, and for a lattice that was not run.  Nothing is added then.
// Sources: T. Kudo, arXiv 1804.10959; Z. Li and J. Eisner, "First- and second-order expectation semirings" (2009).
#pragma once

#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/token/unigram_weights.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct ScoreMoments {
  double mean = 0, variance = 0;  ///< of S, not multiplied by alpha
  double entropy = 0;             ///< of P, in nats
};

/// Where gradients are added.
struct LatticeGrad {
  std::span<double> theta;  ///< one for each piece of the model
  double alpha = 0;
};

class Lattice {
 public:
  /// log Z.  `weights` and the text must outlive the calls that follow.
  double run(const UnigramWeights& weights, std::string_view text) {
    forward(weights, text);
    if (weights.deep()) {
      detail::lattice_backward<true, false>(weights, text, backward_.data());
    } else {
      detail::lattice_backward<false, false>(weights, text, backward_.data());
    }
    return log_partition();
  }

  /// log Z, and counts[p] += scale E[count of p].
  double run_counts(const UnigramWeights& weights, std::string_view text, double scale,
                    std::span<double> counts) {
    require_pieces("Lattice::run_counts: counts", counts.size(), weights);
    forward(weights, text);
    if (weights.deep()) {
      detail::lattice_backward<true, true>(weights, text, backward_.data(), forward_.data(), scale,
                                           counts.data());
    } else {
      detail::lattice_backward<false, true>(weights, text, backward_.data(), forward_.data(), scale,
                                            counts.data());
    }
    return log_partition();
  }

  std::size_t size() const { return text_.size(); }
  double log_partition() const {
    require_run();
    return text_.empty() ? 0.0 : detail::log_of(forward_[size()]);
  }

  /// P(some piece ends at byte i), 0 <= i <= size(); 1 at both ends.
  double boundary(std::size_t i) const {
    require_run();
    detail::require_index("Lattice::boundary: i", static_cast<Index>(i),
                          static_cast<Index>(size()) + 1);
    return q(i);
  }
  double expected_tokens() const {
    require_run();
    double sum = 0;
    for (std::size_t i = 1; i <= size(); ++i) sum += q(i);
    return sum;
  }

  /// f(begin, end, piece, marginal) for every edge that lies on a segmentation, by begin, then end.
  template <class F>
  void edges(F&& f) const {
    require_run();
    const double* const w = weights_->mantissa();
    const std::int32_t* const exponent = weights_->exponent();
    const detail::Scaled& z = forward_[size()];
    for (std::size_t s = 0; s < size(); ++s) {
      const detail::Scaled& a = forward_[s];
      if (a.m == 0 || backward_[s].m == 0) continue;
      const double before = a.m / z.m;
      trie().walk(text_.substr(s), [&](std::size_t length, std::uint32_t p) {
        const detail::Scaled& b = backward_[s + length];
        if (b.m == 0) return;
        f(s, s + length, p, detail::scale_by(before * (w[p] * b.m), a.k - z.k + b.k + exponent[p]));
      });
    }
  }

  /// counts[p] += scale E[count of p].
  void add_expected_counts(std::span<double> counts, double scale = 1) const {
    require_run();
    require_pieces("Lattice::add_expected_counts: counts", counts.size(), *weights_);
    edges([&](std::size_t, std::size_t, std::uint32_t p, double m) { counts[p] += scale * m; });
  }

  ScoreMoments moments() {
    require_run();
    after();
    return {mean_after_[0], variance_after_[0],
            std::max(0.0, log_partition() - weights_->alpha() * mean_after_[0])};
  }

  /// S of a segmentation of the text, given by its pieces.
  double score(std::span<const std::uint32_t> pieces) const {
    require_run();
    const UnigramModel& model = weights_->model();
    double sum = 0;
    std::size_t at = 0;
    for (const std::uint32_t p : pieces) {
      detail::require(p < model.size(), "Lattice: pieces has the entry ", p, ", the model ",
                      model.size(), " pieces");
      detail::require(text_.substr(at, model.length(p)) == model.piece(p), "Lattice: piece ", p,
                      " (", detail::quoted_bytes(model.piece(p)), ") is not the text at byte ", at);
      at += model.length(p);
      sum += weights_->theta()[p];
    }
    detail::require(at == size(), "Lattice: the pieces cover ", at, " bytes, the text has ",
                    size());
    return sum;
  }
  /// log P of a segmentation.
  double log_prob(std::span<const std::uint32_t> pieces) const {
    return weights_alpha() * score(pieces) - log_partition();
  }

  /// Adds upstream d log Z.
  void add_log_partition_grad(double upstream, LatticeGrad& grad) const {
    require_grad(grad);
    const double scale = upstream * weights_->alpha();
    const std::vector<double>& theta = weights_->theta();
    double mean = 0;
    edges([&](std::size_t, std::size_t, std::uint32_t p, double m) {
      grad.theta[p] += scale * m;
      mean += m * theta[p];
    });
    grad.alpha += upstream * mean;
  }

  /// Adds upstream d log P(y).
  void add_log_prob_grad(std::span<const std::uint32_t> pieces, double upstream,
                         LatticeGrad& grad) const {
    require_grad(grad);
    grad.alpha += upstream * score(pieces);
    for (const std::uint32_t p : pieces) grad.theta[p] += upstream * weights_->alpha();
    add_log_partition_grad(-upstream, grad);
  }

  /// Adds upstream d E[S].
  void add_score_mean_grad(double upstream, LatticeGrad& grad) {
    require_grad(grad);
    add_mean_grad(upstream, upstream * weights_->alpha(), grad);
    grad.alpha += upstream * variance_after_[0];
  }

  /// Adds upstream dH.
  void add_entropy_grad(double upstream, LatticeGrad& grad) {
    require_grad(grad);
    const double alpha = weights_->alpha();
    add_mean_grad(0, -upstream * alpha * alpha, grad);
    grad.alpha -= upstream * alpha * variance_after_[0];
  }

 private:
  const ByteTrie& trie() const { return weights_->model().trie(); }
  double weights_alpha() const {
    require_run();
    return weights_->alpha();
  }
  double q(std::size_t i) const {
    return detail::probability(forward_[i], backward_[i], forward_[size()]);
  }

  void forward(const UnigramWeights& weights, std::string_view text) {
    weights_ = nullptr;
    forward_.resize(std::max(forward_.size(), text.size() + 1));
    backward_.resize(forward_.size());
    if (weights.deep()) {
      detail::lattice_forward<true>(weights, text, forward_.data());
    } else {
      detail::lattice_forward<false>(weights, text, forward_.data());
    }
    if (forward_[text.size()].m == 0) {
      detail::raise_no_segmentation(text, detail::last_reached(forward_.data(), text.size()));
    }
    weights_ = &weights;
    text_ = text;
    have_after_ = false;
  }

  /// Mean and variance of the score of what comes after each position, by the law of total variance: no cancellation.
  void after() {
    if (have_after_) return;
    const std::size_t n = size();
    const std::vector<double>& theta = weights_->theta();
    mean_after_.resize(std::max(mean_after_.size(), n + 1));
    variance_after_.resize(mean_after_.size());
    mean_after_[n] = variance_after_[n] = 0;
    for (std::size_t s = n; s-- > 0;) {
      terms_.clear();
      double mean = 0, variance = 0;
      trie().walk(text_.substr(s), [&](std::size_t length, std::uint32_t p) {
        const std::size_t e = s + length;
        if (backward_[e].m == 0) return;
        const double rho =
            detail::scale_by(weights_->mantissa()[p] * backward_[e].m / backward_[s].m,
                             weights_->exponent()[p] + backward_[e].k - backward_[s].k);
        terms_.push_back({rho, theta[p] + mean_after_[e], variance_after_[e]});
        mean += rho * terms_.back().score;
      });
      for (const Term& t : terms_)
        variance += t.rho * (t.variance + (t.score - mean) * (t.score - mean));
      mean_after_[s] = mean;
      variance_after_[s] = variance;
    }
    have_after_ = true;
  }

  /// grad.theta += direct c + through q.
  void add_mean_grad(double direct, double through, LatticeGrad& grad) {
    after();
    const std::vector<double>& theta = weights_->theta();
    mean_before_.assign(size() + 1, 0.0);
    edges([&](std::size_t s, std::size_t e, std::uint32_t p, double m) {
      // Means of the score before: sums of pi_e (FS + theta), and pi_e = marginal / P(boundary at e).
      const double score = theta[p] + mean_before_[s] / q_or_one(s);
      mean_before_[e] += m * score;
      grad.theta[p] += m * (direct + through * (score + mean_after_[e] - mean_after_[0]));
    });
  }
  double q_or_one(std::size_t i) const {
    const double x = q(i);
    return x > 0 ? x : 1;
  }

  void require_run() const {
    detail::require(weights_ != nullptr, "Lattice: run() must come first");
  }
  static void require_pieces(const char* name, std::size_t size, const UnigramWeights& weights) {
    detail::require_size(name, static_cast<Index>(size), static_cast<Index>(weights.model().size()),
                         "one for each piece");
  }
  void require_grad(const LatticeGrad& grad) const {
    require_run();
    require_pieces("LatticeGrad::theta", grad.theta.size(), *weights_);
  }

  struct Term {
    double rho, score, variance;
  };

  const UnigramWeights* weights_ = nullptr;
  std::string_view text_;
  std::vector<detail::Scaled> forward_, backward_;
  std::vector<double> mean_before_, mean_after_, variance_after_;
  std::vector<Term> terms_;
  bool have_after_ = false;
};

/// The number of segmentations, exact up to 2^53; infinity above 1.8e308 (log Z at alpha = 0 is its logarithm).
inline double count_segmentations(const UnigramModel& model, std::string_view text) {
  std::vector<double> count(text.size() + 1, 0.0);
  count[0] = 1;
  for (std::size_t s = 0; s < text.size(); ++s) {
    if (count[s] == 0) continue;
    model.trie().walk(text.substr(s),
                      [&](std::size_t length, std::uint32_t) { count[s + length] += count[s]; });
  }
  return count.back();
}

/// counts[p] = sum over texts of frequency E[count of p]; returns the sum of frequency log Z.  `frequency` may be
/// empty (all 1).  Texts go to at most 16 tasks, cut by bytes, each with counts of its own.
/// Errors: invalid_argument for sizes; data_error, with its number, for the first text without a segmentation.
inline double lattice_expected_counts(const UnigramWeights& weights,
                                      std::span<const std::string_view> texts,
                                      std::span<const double> frequency, std::span<double> counts,
                                      ExecutorRef executor = {}) {
  const std::size_t pieces = weights.model().size();
  detail::require(frequency.empty() || frequency.size() == texts.size(),
                  "lattice_expected_counts: frequency has ", frequency.size(),
                  " entries, expected ", texts.size(), " (one for each text)");
  detail::require(counts.size() == pieces, "lattice_expected_counts: counts has ", counts.size(),
                  " entries, expected ", pieces, " (one for each piece)");
  constexpr std::size_t kTasks = 16;
  std::vector<std::size_t> begin(kTasks + 1, texts.size());
  std::size_t total = 0, seen = 0, task = 0;
  for (const std::string_view text : texts) total += text.size() + 1;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    while (task < kTasks && seen * kTasks >= task * total) begin[task++] = i;
    seen += texts[i].size() + 1;
  }
  struct Part {
    std::vector<double> counts;
    double log_partition = 0;
    std::size_t failed = std::numeric_limits<std::size_t>::max();
  };
  std::vector<Part> parts(kTasks);
  std::vector<Lattice> lattices(static_cast<std::size_t>(executor.workers()));
  // An executor need not let exceptions through: a text without a segmentation is found here and reported below.
  executor.run(static_cast<Index>(kTasks), [&](Index t, int worker) {
    Part& part = parts[static_cast<std::size_t>(t)];
    const std::size_t first = begin[static_cast<std::size_t>(t)];
    const std::size_t last = begin[static_cast<std::size_t>(t) + 1];
    if (first == last) return;
    part.counts.assign(pieces, 0.0);
    Lattice& lattice = lattices[static_cast<std::size_t>(worker)];
    for (std::size_t i = first; i < last; ++i) {
      if (!weights.model().covers_all_bytes() &&
          count_segmentations(weights.model(), texts[i]) == 0) {
        part.failed = i;
        return;
      }
      const double f = frequency.empty() ? 1.0 : frequency[i];
      part.log_partition += f * lattice.run_counts(weights, texts[i], f, part.counts);
    }
  });
  for (const Part& part : parts) {
    if (part.failed < texts.size()) {
      const std::string_view text = texts[part.failed];
      const std::size_t reached = detail::last_reached(weights.model().trie(), text);
      detail::raise<data_error>("lattice_expected_counts: text ", part.failed,
                                ": no piece of the model reaches past byte ", reached, " (",
                                detail::quoted_bytes(text.substr(reached, 8)), "..)");
    }
  }
  std::fill(counts.begin(), counts.end(), 0.0);
  double sum = 0;
  for (const Part& part : parts) {
    sum += part.log_partition;
    for (std::size_t p = 0; p < part.counts.size(); ++p) counts[p] += part.counts[p];
  }
  return sum;
}

/// theta = logits - log sum exp(logits).
inline void unigram_theta_forward(std::span<const double> logits, std::span<double> theta) {
  detail::require(theta.size() == logits.size(), "unigram_theta_forward: theta has ", theta.size(),
                  " entries, expected ", logits.size(), " (as logits)");
  if (logits.empty()) return;
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double x : logits) sum += std::exp(x - largest);
  const double shift = largest + std::log(sum);
  for (std::size_t p = 0; p < logits.size(); ++p) theta[p] = logits[p] - shift;
}

/// grad_logits = grad_theta - exp(theta) sum of grad_theta; the two may be the same.
inline void unigram_theta_backward(std::span<const double> theta,
                                   std::span<const double> grad_theta,
                                   std::span<double> grad_logits) {
  detail::require(grad_theta.size() == theta.size(), "unigram_theta_backward: grad_theta has ",
                  grad_theta.size(), " entries, expected ", theta.size(), " (as theta)");
  detail::require(grad_logits.size() == theta.size(), "unigram_theta_backward: grad_logits has ",
                  grad_logits.size(), " entries, expected ", theta.size(), " (as theta)");
  double sum = 0;
  for (const double g : grad_theta) sum += g;
  for (std::size_t p = 0; p < theta.size(); ++p)
    grad_logits[p] = grad_theta[p] - std::exp(theta[p]) * sum;
}

EIGENBLOCKS_NAMESPACE_END
