// Random segmentations of a text: exact draws from P(y) = exp(alpha S(y)) / Z, and the other laws that are in use.
//
//   const UnigramWeights weights(model, 0.1);
//   LatticeSampler sampler;                              // owns the tables: nothing is allocated once they have grown
//   sampler.run(weights, text);                          // log Z
//   Random random(seed, document);                       // or any UniformRandomBitGenerator of the standard library
//   const double log_p = sampler.draw(random, pieces);   // appends one segmentation; as many draws as wanted
//   auto ids = sample_encode(weights, texts, seed, first_document, pool);      // document i has the stream (seed, i)
//
//   sample_segmentation(sampler, weights, text, random, pieces, SamplingRule::legacy);   // one draw by any rule
//   sample_without_replacement(weights, text, k, random);                      // k different ones
//   sample_from(nbest(model, text, l), alpha, random);                         // Kudo's l: one of the l best
//
// perfect      B by one pass from the right; then from the left, with one uniform number for each piece, a piece with
//              probability w_p B[e] / B[s].  The product of these is P(y).
// reservoir    one pass: each position holds one of the pieces that end there, with probability F[s] w_p / F[e] in the end; one
//              uniform number for each edge that has a rival.  The same law.
// legacy       BytePiece 0.4.x: a rival replaces the piece held with probability sigmoid(alpha (x - score held)), x its score by
//              the path held.  Biased: of equal segmentations those looked at later are preferred.  alpha = 0 is
//              Viterbi.  legacy_law gives its exact law for short texts.
//
// Without replacement: Gumbel-top-k over the tree of prefixes, best first.  With kappa, the next perturbed score,
// a segmentation had the probability 1 - exp(-exp(log_prob - kappa)) of being among them.
// Errors: data_error for a text without a segmentation; invalid_argument for k < 0, an empty list, a sampler not run.
// Sources: T. Kudo, arXiv 1804.10959; W. Kool et al., arXiv 1903.06059; https://kexue.fm/archives/9768 (legacy), 9811 (reservoir).
#pragma once

#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/token/nbest.hpp>
#include <eigenblocks/token/unigram_weights.hpp>

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class SamplingRule { perfect, reservoir, legacy };

namespace detail {

/// [0, 1) from the library's generator or one of the standard library's.
template <class G>
double uniform53(G& random) {
  if constexpr (requires {
                  { random.uniform() } -> std::convertible_to<double>;
                }) {
    return random.uniform();
  } else {
    static_assert(std::uniform_random_bit_generator<G>);
    // Some implementations round up to 1.
    return std::min(std::generate_canonical<double, 53>(random), 1 - 0x1p-53);
  }
}

/// Standard Gumbel.
template <class G>
double gumbel(G& random) {
  return -std::log(-std::log(uniform53(random) + 0x1p-54));
}

}  // namespace detail

class LatticeSampler {
 public:
  /// Prepares draws; log Z.  `weights` and the text must outlive them.
  double run(const UnigramWeights& weights, std::string_view text) {
    weights_ = nullptr;
    backward_.resize(std::max(backward_.size(), text.size() + 1));
    if (weights.deep()) {
      detail::lattice_backward<true, false>(weights, text, backward_.data());
    } else {
      detail::lattice_backward<false, false>(weights, text, backward_.data());
    }
    if (backward_[0].m == 0) {
      detail::raise_no_segmentation(text, detail::last_reached(weights.model().trie(), text));
    }
    weights_ = &weights;
    text_ = text;
    log_partition_ = text.empty() ? 0.0 : detail::log_of(backward_[0]);
    return log_partition_;
  }

  double log_partition() const {
    require_run();
    return log_partition_;
  }

  /// Appends the pieces of one segmentation; log P of it.
  template <class G>
  double draw(G& random, std::vector<std::uint32_t>& pieces) const {
    require_run();
    const std::vector<double>& theta = weights_->theta();
    double score = 0;
    for (std::size_t s = 0; s < text_.size();) {
      const double u = detail::uniform53(random);
      const Edge edge = choose(s, u);
      pieces.push_back(edge.piece);
      score += theta[edge.piece];
      s += edge.length;
    }
    return weights_->alpha() * score - log_partition_;
  }

  // What searches over prefixes need ---------------------------------------------------------------
  const UnigramWeights& weights() const { return *weights_; }
  std::string_view text() const { return text_; }
  /// f(end, piece, rho): the pieces that may come next at s, and their probabilities.
  template <class F>
  void next(std::size_t s, F&& f) const {
    const detail::Scaled& sum = backward_[s];
    weights_->model().trie().walk(text_.substr(s), [&](std::size_t length, std::uint32_t p) {
      const detail::Scaled& b = backward_[s + length];
      if (b.m == 0) return;
      f(s + length, p,
        detail::scale_by(weights_->mantissa()[p] * b.m / sum.m,
                         b.k + weights_->exponent()[p] - sum.k));
    });
  }

 private:
  struct Edge {
    std::uint32_t piece, length;
  };

  /// The edge from s at which the running sum of w B passes u times its total.
  Edge choose(std::size_t s, double u) const {
    const ByteTrie::Unit* const units = weights_->model().trie().units();
    const double* const w = weights_->mantissa();
    const std::int32_t* const exponent = weights_->exponent();
    const detail::Scaled total = backward_[s];
    const double target = u * total.m;
    double sum = 0;
    std::uint32_t base = 0;
    Edge last{};
    for (std::size_t e = s; e < text_.size();) {
      const auto c = static_cast<std::uint8_t>(text_[e++]);
      const ByteTrie::Unit unit = units[base + c];
      if (!unit.is(c)) break;
      base = unit.base;
      const std::uint32_t p = unit.key();
      if (p == ByteTrie::kNone) continue;
      const detail::Scaled& b = backward_[e];
      const double x = detail::scale_by(w[p] * b.m, b.k + exponent[p] - total.k);
      if (x == 0) continue;
      last = {p, static_cast<std::uint32_t>(e - s)};
      sum += x;
      if (sum > target) break;
    }
    return last;  // the last one with a weight, where rounding keeps the sum below
  }

  void require_run() const {
    detail::require(weights_ != nullptr, "LatticeSampler: run() must come first");
  }

  const UnigramWeights* weights_ = nullptr;
  std::string_view text_;
  std::vector<detail::Scaled> backward_;
  double log_partition_ = 0;
};

namespace detail {

/// Follows back the piece held at each end; appends the pieces, first to last.
inline double append_held(const UnigramWeights& weights, const std::vector<std::uint32_t>& held,
                          std::vector<std::uint32_t>& pieces) {
  const std::size_t begin = pieces.size();
  double score = 0;
  for (std::size_t e = held.size() - 1; e > 0; e -= weights.model().length(held[e]))
    pieces.push_back(held[e]);
  std::reverse(pieces.begin() + static_cast<std::ptrdiff_t>(begin), pieces.end());
  for (std::size_t i = begin; i < pieces.size(); ++i) score += weights.theta()[pieces[i]];
  return score;
}

template <class G>
double reservoir_sample(const UnigramWeights& weights, std::string_view text, G& random,
                        std::vector<std::uint32_t>& pieces) {
  const std::size_t n = text.size();
  std::vector<Scaled> forward(n + 1);
  std::vector<std::uint32_t> held(n + 1, ByteTrie::kNone);
  forward[0] = {1, 0};
  for (std::size_t s = 0; s < n; ++s) {
    normalise(forward[s]);
    const Scaled start = forward[s];
    if (start.m == 0) continue;
    weights.model().trie().walk(text.substr(s), [&](std::size_t length, std::uint32_t p) {
      const std::size_t e = s + length;
      const Scaled x{start.m * weights.mantissa()[p], start.k + weights.exponent()[p]};
      add_scaled(forward[e], x.m, x.k);
      // The first comes in without a draw.
      if (held[e] == ByteTrie::kNone ||
          uniform53(random) < scale_by(x.m / forward[e].m, x.k - forward[e].k)) {
        held[e] = p;
      }
    });
  }
  if (n > 0 && held[n] == ByteTrie::kNone)
    raise_no_segmentation(text, last_reached(forward.data(), n));
  if (n == 0) return 0;
  normalise(forward[n]);
  return weights.alpha() * append_held(weights, held, pieces) - log_of(forward[n]);
}

/// Probability that a rival with score x replaces what is held with score `held`.
inline double legacy_accept(double alpha, double x, double held) {
  if (alpha == 0) return x > held ? 1 : 0;
  return 1 / (1 + std::exp(-alpha * (x - held)));
}

template <class G>
void legacy_sample(const UnigramWeights& weights, std::string_view text, G& random,
                   std::vector<std::uint32_t>& pieces) {
  const std::size_t n = text.size();
  std::vector<double> score(n + 1, 0.0);
  std::vector<std::uint32_t> held(n + 1, ByteTrie::kNone);
  std::size_t reached = 0;
  for (std::size_t s = 0; s < n; ++s) {
    if (s > 0 && held[s] == ByteTrie::kNone) continue;
    reached = s;
    weights.model().trie().walk(text.substr(s), [&](std::size_t length, std::uint32_t p) {
      const std::size_t e = s + length;
      const double x = score[s] + weights.theta()[p];
      if (held[e] == ByteTrie::kNone ||
          uniform53(random) < legacy_accept(weights.alpha(), x, score[e])) {
        held[e] = p;
        score[e] = x;
      }
    });
  }
  if (n > 0 && held[n] == ByteTrie::kNone) raise_no_segmentation(text, reached);
  append_held(weights, held, pieces);
}

}  // namespace detail

/// Appends the pieces of one segmentation drawn by the rule.  Returns log P (at alpha, the exact law) for perfect and
/// reservoir, NaN for legacy, whose law has no short form.
template <class G>
double sample_segmentation(LatticeSampler& sampler, const UnigramWeights& weights,
                           std::string_view text, G& random, std::vector<std::uint32_t>& pieces,
                           SamplingRule rule = SamplingRule::perfect) {
  switch (rule) {
    case SamplingRule::perfect:
      sampler.run(weights, text);
      return sampler.draw(random, pieces);
    case SamplingRule::reservoir:
      return detail::reservoir_sample(weights, text, random, pieces);
    case SamplingRule::legacy:
      detail::legacy_sample(weights, text, random, pieces);
      return std::numeric_limits<double>::quiet_NaN();
  }
  detail::raise<invalid_argument>("sample_segmentation: rule (", rule, ") is not a SamplingRule");
}

/// Ids of one segmentation of each text.  Text i draws from Random(seed, first_document + i): neither the number of workers
/// nor the other texts matter.  Errors: data_error, with its number, for the first text without a segmentation.
inline std::vector<std::vector<TokenId>> sample_encode(const UnigramWeights& weights,
                                                       std::span<const std::string_view> texts,
                                                       std::uint64_t seed,
                                                       std::uint64_t first_document = 0,
                                                       ExecutorRef executor = {},
                                                       SamplingRule rule = SamplingRule::perfect) {
  const UnigramModel& model = weights.model();
  struct Scratch {
    LatticeSampler sampler;
    std::vector<std::uint32_t> pieces;
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(executor.workers()));
  std::vector<std::vector<TokenId>> ids(texts.size());
  if (!model.covers_all_bytes()) {  // executors need not let exceptions through
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const std::size_t reached = detail::last_reached(model.trie(), texts[i]);
      if (reached < texts[i].size()) {
        detail::raise<data_error>("sample_encode: text ", i,
                                  ": no piece of the model reaches past byte ", reached, " (",
                                  detail::quoted_bytes(texts[i].substr(reached, 8)), "..)");
      }
    }
  }
  executor.run(static_cast<Index>(texts.size()), [&](Index task, int worker) {
    const auto i = static_cast<std::size_t>(task);
    Scratch& own = scratch[static_cast<std::size_t>(worker)];
    Random random(seed, first_document + i);
    own.pieces.clear();
    sample_segmentation(own.sampler, weights, texts[i], random, own.pieces, rule);
    ids[i].reserve(own.pieces.size());
    for (const std::uint32_t p : own.pieces) ids[i].push_back(model.id(p));
  });
  return ids;
}

struct LegacyOutcome {
  std::vector<std::uint32_t> pieces;
  double probability = 0;
};

/// The law of SamplingRule::legacy, all its outcomes, by their ends in ascending order.  Goes through every combination of
/// decisions: invalid_argument if they are more than `limit`.
inline std::vector<LegacyOutcome> legacy_law(const UnigramWeights& weights, std::string_view text,
                                             double limit = 1 << 24) {
  struct Edge {
    std::size_t begin;
    std::uint32_t piece;
  };
  const std::size_t n = text.size();
  std::vector<std::vector<Edge>> into(n + 1);
  std::size_t reached = 0;
  for (std::size_t s = 0; s < n; ++s) {
    if (s > 0 && into[s].empty()) continue;
    reached = s;
    weights.model().trie().walk(text.substr(s), [&](std::size_t length, std::uint32_t p) {
      into[s + length].push_back({s, p});
    });
  }
  if (n > 0 && into[n].empty()) detail::raise_no_segmentation(text, reached);
  double combinations = 1;
  for (const auto& edges : into)
    combinations *= std::max<double>(1, static_cast<double>(edges.size()));
  detail::require(combinations <= limit, "legacy_law: ", combinations,
                  " combinations of decisions, the limit is ", limit);

  struct Walk {
    const UnigramWeights& weights;
    const std::vector<std::vector<Edge>>& into;
    std::vector<double> score;
    std::vector<std::uint32_t> held;
    std::map<std::vector<std::size_t>, LegacyOutcome> law;

    void decide(std::size_t e, double probability) {
      if (probability == 0) return;
      if (e == held.size()) return finish(probability);
      const std::vector<Edge>& edges = into[e];
      if (edges.empty()) return decide(e + 1, probability);
      std::vector<double> x, p;  // scores, and the probability of being held
      for (const Edge& edge : edges) {
        x.push_back(score[edge.begin] + weights.theta()[edge.piece]);
        double taken = x.size() == 1 ? 1 : 0;
        for (std::size_t j = 0; j < p.size(); ++j) {
          const double accept = detail::legacy_accept(weights.alpha(), x.back(), x[j]);
          taken += p[j] * accept;
          p[j] *= 1 - accept;
        }
        p.push_back(taken);
      }
      for (std::size_t j = 0; j < edges.size(); ++j) {
        held[e] = edges[j].piece;
        score[e] = x[j];
        decide(e + 1, probability * p[j]);
      }
    }
    void finish(double probability) {
      std::vector<std::uint32_t> pieces;
      if (held.size() > 1) detail::append_held(weights, held, pieces);
      LegacyOutcome& outcome = law[segmentation_ends(weights.model(), pieces)];
      outcome.pieces = std::move(pieces);
      outcome.probability += probability;
    }
  };
  Walk walk{weights,
            into,
            std::vector<double>(n + 1, 0.0),
            std::vector<std::uint32_t>(n + 1, ByteTrie::kNone),
            {}};
  walk.decide(1, 1.0);
  std::vector<LegacyOutcome> law;
  for (auto& [ends, outcome] : walk.law) law.push_back(std::move(outcome));
  return law;
}

struct DistinctSample {
  std::vector<std::uint32_t> pieces;
  double log_prob = 0;   ///< log P
  double perturbed = 0;  ///< log_prob plus its Gumbel noise: samples come by falling value
};
struct DistinctSamples {
  std::vector<DistinctSample> samples;                      ///< fewer than k if there are no more
  double kappa = -std::numeric_limits<double>::infinity();  ///< of the one after the last

  double inclusion_probability(std::size_t i) const {
    return -std::expm1(-std::exp(samples[i].log_prob - kappa));
  }
};

/// k different segmentations, drawn one after the other without putting back.
template <class G>
DistinctSamples sample_without_replacement(const UnigramWeights& weights, std::string_view text,
                                           std::ptrdiff_t k, G& random) {
  detail::require(k >= 0, "sample_without_replacement: k (", k, ") must be at least 0");
  LatticeSampler sampler;
  const double log_partition = sampler.run(weights, text);
  struct Step {
    std::size_t parent;
    std::uint32_t piece;
  };
  struct Prefix {
    double perturbed,
        log_prob;  // the largest perturbed score of its segmentations; log of their share
    std::size_t end, step;
  };
  const auto worse = [](const Prefix& a, const Prefix& b) { return a.perturbed < b.perturbed; };
  constexpr std::size_t kRoot = std::numeric_limits<std::size_t>::max();
  std::vector<Step> steps;
  std::vector<Prefix> agenda{{detail::gumbel(random), 0, 0, kRoot}}, children;
  DistinctSamples result;
  while (!agenda.empty()) {
    std::pop_heap(agenda.begin(), agenda.end(), worse);
    const Prefix top = agenda.back();
    agenda.pop_back();
    if (top.end == text.size()) {
      if (result.samples.size() == static_cast<std::size_t>(k)) {
        result.kappa = top.perturbed;
        break;
      }
      DistinctSample sample;
      double score = 0;
      for (std::size_t at = top.step; at != kRoot; at = steps[at].parent)
        sample.pieces.push_back(steps[at].piece);
      std::reverse(sample.pieces.begin(), sample.pieces.end());
      for (const std::uint32_t p : sample.pieces) score += weights.theta()[p];
      sample.log_prob = weights.alpha() * score - log_partition;
      sample.perturbed = top.perturbed;
      result.samples.push_back(std::move(sample));
      continue;
    }
    children.clear();
    double largest = -std::numeric_limits<double>::infinity();
    sampler.next(top.end, [&](std::size_t end, std::uint32_t p, double rho) {
      if (rho == 0) return;
      const double log_prob = top.log_prob + std::log(rho);
      children.push_back({log_prob + detail::gumbel(random), log_prob, end, steps.size()});
      steps.push_back({top.step, p});
      largest = std::max(largest, children.back().perturbed);
    });
    // The children's noise, given that the largest of them is the parent's.
    for (Prefix& child : children) {
      if (child.perturbed == largest) {
        child.perturbed = top.perturbed;
      } else {
        const double v =
            top.perturbed - child.perturbed + std::log(-std::expm1(child.perturbed - largest));
        child.perturbed = top.perturbed - std::max(0.0, v) - std::log1p(std::exp(-std::abs(v)));
      }
      agenda.push_back(child);
      std::push_heap(agenda.begin(), agenda.end(), worse);
    }
    // Each prefix holds at least one segmentation with its score: more than are still wanted are not needed.
    const std::size_t wanted = static_cast<std::size_t>(k) - result.samples.size() + 1;
    if (agenda.size() > 64 && agenda.size() / 2 > wanted) {
      const auto middle = agenda.begin() + static_cast<std::ptrdiff_t>(wanted);
      std::nth_element(agenda.begin(), middle, agenda.end(),
                       [&](const Prefix& a, const Prefix& b) { return worse(b, a); });
      agenda.erase(middle, agenda.end());
      std::make_heap(agenda.begin(), agenda.end(), worse);
    }
  }
  return result;
}

/// The place in the list of one entry, drawn with probability proportional to exp(alpha score).
template <class G>
std::size_t sample_from(std::span<const Segmentation> candidates, double alpha, G& random) {
  detail::require(!candidates.empty(), "sample_from: candidates must not be empty");
  detail::require(std::isfinite(alpha) && alpha >= 0, "sample_from: alpha (", alpha,
                  ") must be finite and at least 0");
  double best = candidates[0].score, total = 0;
  for (const Segmentation& y : candidates) best = std::max(best, y.score);
  for (const Segmentation& y : candidates) total += std::exp(alpha * (y.score - best));
  double target = detail::uniform53(random) * total;
  std::size_t last = 0;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const double x = std::exp(alpha * (candidates[i].score - best));
    if (x == 0) continue;
    last = i;
    if ((target -= x) < 0) break;
  }
  return last;
}

EIGENBLOCKS_NAMESPACE_END
