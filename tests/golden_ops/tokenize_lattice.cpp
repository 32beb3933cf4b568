// Golden rows lattice, lattice_long (sums over all segmentations, n best, samplers) and sample_legacy.
#include "support/chi_square.hpp"
#include "support/golden_rows.hpp"

#include <eigenblocks/token/lattice.hpp>
#include <eigenblocks/token/nbest.hpp>
#include <eigenblocks/token/sampling.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace eb = eigenblocks;
using eb::UnigramModel;
using golden::json;
using golden::Row;
using Ends = std::vector<std::size_t>;
using Pieces = std::vector<std::uint32_t>;

constexpr double kNear = 1e-9;

/// {base64: [id, .., count]}; models are read once.
const UnigramModel& load(const std::filesystem::path& path) {
  static std::map<std::string, std::unique_ptr<UnigramModel>> models;
  std::unique_ptr<UnigramModel>& model = models[path.string()];
  if (!model) {
    std::vector<eb::UnigramPiece> pieces;
    const json file = json::parse(golden::read_bytes(path));
    for (const auto& [key, value] : file.items()) {
      pieces.push_back({golden::bytes_of_base64(key), value.front().get<eb::TokenId>(),
                        value.back().get<double>()});
    }
    model = std::make_unique<UnigramModel>(UnigramModel::from_counts(pieces));
  }
  return *model;
}

struct Input {
  explicit Input(Row& row)
      : model(load(row.path("model"))), text(row.bytes("b64")), weights(model, row.real("alpha")) {}
  Ends ends(const Pieces& pieces) const { return eb::segmentation_ends(model, pieces); }

  const UnigramModel& model;
  const std::string text;
  const eb::UnigramWeights weights;
};

/// `got`, by piece, against [[id, value], ..]; what is not listed must be 0.
void expect_by_id(Row& row, const Input& in, const std::string& key, const std::vector<double>& got,
                  double atol, double rtol) {
  std::vector<double> rest = got;
  for (const json& entry : row.want(key)) {
    const std::uint32_t p = in.model.index(entry[0].get<eb::TokenId>());
    row.near(key + " of id " + entry[0].dump(), got[p], entry[1], atol, rtol);
    rest[p] = 0;
  }
  for (std::size_t p = 0; p < rest.size(); ++p) {
    if (std::abs(rest[p]) > atol) row.fail(key + ": piece " + std::to_string(p) + " is not listed");
  }
}

double viterbi_score(const Input& in, Pieces* pieces = nullptr) {
  eb::Viterbi viterbi;
  const double score = viterbi.run(in.model, in.text);
  if (pieces) viterbi.append_pieces(in.model, *pieces);
  return score;
}

void sums(Row& row, const Input& in, double entropy_atol) {
  const std::size_t pieces = in.model.size();
  eb::Lattice lattice;
  row.form("run");
  row.expect_near("log_partition", lattice.run(in.weights, in.text), kNear, kNear);
  const eb::ScoreMoments moments = lattice.moments();
  row.expect_near("entropy", moments.entropy, entropy_atol, kNear);
  row.expect_near("expected_tokens", lattice.expected_tokens(), kNear, kNear);
  std::vector<double> boundary;
  for (std::size_t i = 0; i <= in.text.size(); ++i) boundary.push_back(lattice.boundary(i));
  row.expect_near("boundary", boundary, kNear, kNear);
  std::vector<double> counts(pieces, 0.0);
  lattice.add_expected_counts(counts);
  expect_by_id(row, in, "expected_counts", counts, kNear, kNear);

  row.form("run_counts");
  counts.assign(pieces, 0.0);
  row.expect_near("log_partition", lattice.run_counts(in.weights, in.text, 1, counts), kNear,
                  kNear);
  expect_by_id(row, in, "expected_counts", counts, kNear, kNear);
  row.form("lattice_expected_counts");
  const std::string_view text = in.text;
  row.expect_near("log_partition", eb::lattice_expected_counts(in.weights, {&text, 1}, {}, counts),
                  kNear, kNear);
  expect_by_id(row, in, "expected_counts", counts, kNear, kNear);
  row.form("sampler");
  eb::LatticeSampler sampler;
  row.expect_near("log_partition", sampler.run(in.weights, in.text), kNear, kNear);

  row.form("viterbi, nbest");
  row.expect_near("best_score", viterbi_score(in), kNear, kNear);
  row.expect_near("best_score", eb::nbest(in.model, in.text, 1).at(0).score, kNear, kNear);
}

void edges(Row& row, const Input& in, eb::Lattice& lattice) {
  using Key = std::pair<std::size_t, std::size_t>;
  std::map<Key, std::pair<eb::TokenId, double>> got;
  lattice.edges([&](std::size_t s, std::size_t e, std::uint32_t p, double m) {
    got[{s, e}] = {in.model.id(p), m};
  });
  for (const json& edge : row.want("edges")) {
    const auto found = got.find({edge[0].get<std::size_t>(), edge[1].get<std::size_t>()});
    if (found == got.end() || found->second.first != edge[2].get<eb::TokenId>()) {
      row.fail("edge " + edge.dump() + " is missing");
      continue;
    }
    row.near("edge " + edge.dump(), found->second.second, edge[3], kNear, kNear);
    got.erase(found);
  }
  for (const auto& [key, value] : got) {
    if (value.second > kNear) row.fail("an edge too many at byte " + std::to_string(key.first));
  }
}

/// Draws against a law over ends.  A first p below 1e-4 is put to the test again with four times as many draws.
template <class Draw>
void expect_law(Row& row, const std::map<Ends, double>& law, Draw&& draw) {
  std::vector<double> probability;
  for (const auto& [ends, p] : law) probability.push_back(p);
  double p = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    eb::Random random(2024, static_cast<std::uint64_t>(attempt));
    std::vector<double> seen(law.size(), 0.0);
    for (int i = 0; i < (attempt == 0 ? 20000 : 80000); ++i) {
      const auto found = law.find(draw(random));
      if (found == law.end()) return row.fail("a draw is not one of the paths");
      ++seen[static_cast<std::size_t>(std::distance(law.begin(), found))];
    }
    p = stats::chi_square_p(seen, probability);
    if (p > 1e-4) return;
  }
  row.fail("chi-square p = " + std::to_string(p));
}

void paths(Row& row, const Input& in, const std::vector<eb::Segmentation>& all, double log_z) {
  std::map<Ends, double> law;
  std::map<Ends, const eb::Segmentation*> found;
  for (const eb::Segmentation& y : all) found[in.ends(y.pieces)] = &y;
  const json& wanted = row.want("paths");
  if (wanted.size() != all.size()) return row.fail("paths: got " + std::to_string(all.size()));
  for (const json& path : wanted) {
    const auto ends = path[0].get<Ends>();
    const auto y = found.find(ends);
    if (y == found.end()) return row.fail("path " + path.dump() + " is missing");
    row.near("score of " + path[0].dump(), y->second->score, path[1], kNear, kNear);
    row.near("probability of " + path[0].dump(),
             std::exp(in.weights.alpha() * y->second->score - log_z), path[2], kNear, kNear);
    law[ends] = path[2].get<double>();
  }
  eb::LatticeSampler sampler;
  Pieces pieces;
  for (const auto rule : {eb::SamplingRule::perfect, eb::SamplingRule::reservoir}) {
    row.form(rule == eb::SamplingRule::perfect ? "perfect" : "reservoir");
    expect_law(row, law, [&](eb::Random& random) {
      pieces.clear();
      eb::sample_segmentation(sampler, in.weights, in.text, random, pieces, rule);
      return in.ends(pieces);
    });
  }
  row.form("of the n best");
  expect_law(row, law, [&](eb::Random& random) {
    return in.ends(all[eb::sample_from(all, in.weights.alpha(), random)].pieces);
  });
}

void lattice(Row& row) {
  const Input in(row);
  sums(row, in, kNear);
  eb::Lattice lattice;
  const double log_z = lattice.run(in.weights, in.text);
  row.form("direct");
  const double n_paths = eb::count_segmentations(in.model, in.text);
  row.expect_near("n_paths", n_paths, 0, 0);
  const eb::ScoreMoments moments = lattice.moments();
  row.expect_near("score_mean", moments.mean, kNear, kNear);
  row.expect_near("score_var", moments.variance, kNear, kNear);
  edges(row, in, lattice);

  std::vector<double> theta(in.model.size(), 0.0), counts(in.model.size(), 0.0);
  eb::LatticeGrad grad{theta};
  lattice.add_entropy_grad(1, grad);
  expect_by_id(row, in, "entropy_grad", theta, kNear, kNear);
  row.near("d entropy / d alpha", grad.alpha, -in.weights.alpha() * row.real("score_var"), kNear,
           kNear);
  std::fill(theta.begin(), theta.end(), 0.0);
  grad.alpha = 0;
  lattice.add_log_partition_grad(1, grad);
  lattice.add_expected_counts(counts, in.weights.alpha());
  row.near("d log Z / d alpha", grad.alpha, row.value("score_mean"), kNear, kNear);
  for (std::size_t p = 0; p < counts.size(); ++p) {
    if (std::abs(theta[p] - counts[p]) > kNear) row.fail("d log Z is not alpha times the counts");
  }

  const std::vector<eb::Segmentation> two = eb::nbest(in.model, in.text, 2);
  if (two.size() < 2 || two[0].score - two[1].score > kNear) {
    row.expect("best_ends", in.ends(two[0].pieces));
    Pieces best;
    viterbi_score(in, &best);
    row.expect("best_ends", in.ends(best));
  } else {
    row.want("best_ends");
  }
  if (row.has("nbest")) {
    row.form("n best");
    const json& wanted = row.want("nbest");
    const bool distinct = row.flag("nbest_distinct");
    const auto got = eb::nbest(in.model, in.text, static_cast<std::ptrdiff_t>(wanted.size()));
    if (got.size() != wanted.size()) row.fail("n best: got " + std::to_string(got.size()));
    for (std::size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
      row.near("nbest[" + std::to_string(i) + "]", got[i].score, wanted[i][1], kNear, kNear);
      if (distinct && in.ends(got[i].pieces) != wanted[i][0].get<Ends>()) {
        row.fail("nbest[" + std::to_string(i) + "]: other ends than " + wanted[i][0].dump());
      }
    }
  }
  if (row.has("paths")) {
    row.form("paths");
    paths(row, in, eb::nbest(in.model, in.text, std::ptrdiff_t{1} << 40), log_z);
  }
}

void lattice_long(Row& row) {
  const Input in(row);
  sums(row, in, 1e-8);
}

void sample_legacy(Row& row) {
  const Input in(row);
  eb::LatticeSampler sampler;
  std::map<Ends, double> law;
  for (const eb::LegacyOutcome& y : eb::legacy_law(in.weights, in.text))
    law[in.ends(y.pieces)] = y.probability;
  eb::Lattice lattice;
  lattice.run(in.weights, in.text);
  std::map<Ends, double> exact;
  for (const eb::Segmentation& y : eb::nbest(in.model, in.text, std::ptrdiff_t{1} << 40))
    exact[in.ends(y.pieces)] = std::exp(lattice.log_prob(y.pieces));
  const json& wanted = row.want("paths");
  if (wanted.size() != law.size()) row.fail("paths: got " + std::to_string(law.size()));
  double variation = 0;
  for (const json& path : wanted) {
    const auto ends = path[0].get<Ends>();
    if (!law.contains(ends)) return row.fail("path " + path.dump() + " is missing");
    row.near("legacy " + path[0].dump(), law[ends], path[1], kNear, kNear);
    row.near("exact " + path[0].dump(), exact[ends], path[2], kNear, kNear);
    variation += std::abs(law[ends] - exact[ends]) / 2;
  }
  row.expect_near("total_variation", variation, kNear, kNear);
  row.form("draws");
  Pieces pieces;
  expect_law(row, law, [&](eb::Random& random) {
    pieces.clear();
    eb::sample_segmentation(sampler, in.weights, in.text, random, pieces, eb::SamplingRule::legacy);
    return in.ends(pieces);
  });
}

}  // namespace

void register_lattice(golden::RowRegistry& rows) {
  rows.add("lattice", lattice);
  rows.add("lattice_long", lattice_long);
  rows.add("sample_legacy", sample_legacy);
}
