// DEER: a tanh RNN over T steps at once by Newton sweeps, against one step after the other.
//
//   07_deer                                  T = 1000, 10000, 100000; table on the screen, deer.svg beside the program
//   07_deer --tokens 2000 --rounds 1         one length, one timing each
//   07_deer --size 64 --gain 0.9 --out FOLDER
//
// The RNN is x_t = tanh(x_{t-1} W + u_t) with entries of W of standard deviation gain/sqrt(size), in double.  Every solve is
// compared with the sequential states; a solve that falls back, or is off by more than 1e-6, makes the program fail.
// What to expect: the sweeps hardly grow with T, and each is work that can be shared by cores, while the sequential loop
// cannot.  But one core does a step of a small RNN in the time of a few memory accesses, so on a CPU the loop stays ahead;
// the table says by how much.
#include "support/arguments.hpp"
#include "support/svg.hpp"

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/deer.hpp>
#include <eigenblocks/ssm/rnn.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

namespace {

using namespace example;
namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

struct Problem {
  Matrix<double> weight, u;
  Vector<double> initial;
};

struct Method {
  const char* name;
  eb::DeerMethod method;
  const char* colour;
};
constexpr Method kMethods[] = {{"Newton (DEER)", eb::DeerMethod::newton, "#d1495b"},
                               {"quasi (diagonal)", eb::DeerMethod::quasi, "#1f77b4"},
                               {"Jacobi", eb::DeerMethod::jacobi, "#7a5195"}};

struct Result {
  eb::DeerStatus status;
  double error = 0;
  double seconds[2] = {0, 0};  ///< one thread, two threads
};

/// Seconds of the fastest of `rounds` calls.
template <class F>
double fastest(long long rounds, F&& f) {
  double best = HUGE_VAL;
  for (long long i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

Problem make_problem(Index tokens, Index size, double gain) {
  eb::Random random(7);
  const double spread = gain / std::sqrt(static_cast<double>(size));
  Problem p{eb::normal_matrix<double>(random, size, size, spread),
            eb::normal_matrix<double>(random, tokens, size, 0.5), Vector<double>::Zero(size)};
  return p;
}

Result solve(const Problem& p, const Matrix<double>& want, eb::DeerMethod method,
             long long rounds) {
  const auto cell = eb::tanh_cell(p.weight);
  const eb::DeerOptions options{.method = method, .guess = eb::DeerGuess::zeros, .max_sweeps = 300};
  const eb::thread_pool pool(2);
  const eb::ExecutorRef executors[] = {eb::ExecutorRef(eb::serial), eb::ExecutorRef(pool)};
  Matrix<double> x(want.rows(), want.cols()), first;
  Result result;
  for (int threads = 0; threads < 2; ++threads) {
    result.seconds[threads] = fastest(rounds, [&] {
      result.status = eb::deer_forward(cell, p.u, p.initial, x, options, executors[threads]);
    });
    if (threads == 0) {
      first = x;
    } else if (x != first) {
      throw usage_error("two threads do not give the bits of one");
    }
  }
  result.error = (x - want).cwiseAbs().maxCoeff();
  return result;
}

/// Residuals of the sweeps, one line per method and length.
void draw(const std::string& path, const std::vector<Index>& lengths,
          const std::vector<std::vector<Result>>& results, Index size, double gain) {
  constexpr double kLeft = 90, kTop = 110, kWidth = 760, kHeight = 420, kDecades = 14;
  std::size_t most = 1;
  for (const auto& row : results) {
    for (const Result& r : row) most = std::max(most, r.status.residuals.size());
  }
  Svg svg(980, 640);
  svg.text(40, 40, "How fast all steps of a tanh RNN are found at once",
           {.size = 22, .bold = true});
  svg.text(40, 64,
           format("largest update of each sweep; %lld states, gain %.2g; sweeps on a square-root "
                  "scale, one line for each length",
                  static_cast<long long>(size), gain),
           {.colour = "#555"});
  const auto x = [&](double sweep) {
    return kLeft + kWidth * std::sqrt(sweep / static_cast<double>(most));
  };
  const auto y = [&](double residual) {
    const double decades = std::clamp(-std::log10(std::max(residual, 1e-30)) + 1, 0.0, kDecades);
    return kTop + kHeight * decades / kDecades;
  };
  for (int decade = 1; decade >= -13; decade -= 2) {
    const double at = y(std::pow(10.0, decade));
    svg.line(kLeft, at, kLeft + kWidth, at, {"#e5e5e5"});
    svg.text(kLeft - 8, at + 4, format("1e%d", decade), {.size = 12, .anchor = "end"});
  }
  for (const std::size_t sweep : {std::size_t{1}, std::size_t{2}, std::size_t{5}, std::size_t{10},
                                  std::size_t{20}, std::size_t{50}, std::size_t{100}}) {
    if (sweep > most) continue;
    svg.text(x(static_cast<double>(sweep)), kTop + kHeight + 20,
             format("%lld", static_cast<long long>(sweep)), {.size = 12, .anchor = "middle"});
  }
  svg.text(kLeft + kWidth / 2, kTop + kHeight + 44, "sweep", {.anchor = "middle"});
  constexpr const char* kDashes[] = {"", "7 4", "2 3"};
  for (std::size_t l = 0; l < results.size(); ++l) {
    for (std::size_t m = 0; m < results[l].size(); ++m) {
      Svg::Points line;
      const auto& residuals = results[l][m].status.residuals;
      for (std::size_t k = 0; k < residuals.size(); ++k) {
        line.emplace_back(x(static_cast<double>(k + 1)), y(residuals[k]));
      }
      svg.polyline(line, {kMethods[m].colour, 2, kDashes[l % 3]});
    }
    const double at = kTop + kHeight + 70;
    const double left = kLeft + 200 * static_cast<double>(l);
    svg.line(left, at - 4, left + 40, at - 4, {"#222", 2, kDashes[l % 3]});
    svg.text(left + 48, at, format("T = %lld", static_cast<long long>(lengths[l])));
  }
  for (std::size_t m = 0; m < std::size(kMethods); ++m) {
    svg.text(kLeft + kWidth - 150, kTop + 20 + 22 * static_cast<double>(m), kMethods[m].name,
             {.size = 15, .colour = kMethods[m].colour, .bold = true});
  }
  svg.save(path);
}

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments({{"tokens", "0"},
                       {"size", "16"},
                       {"gain", "0.6"},
                       {"rounds", "3"},
                       {"out", here.empty() ? "." : here}});
  arguments.parse(argc, argv);
  const Index size = static_cast<Index>(arguments.integer("size", 1));
  const double gain = arguments.real("gain", 0);
  const long long rounds = arguments.integer("rounds", 1);
  std::vector<Index> lengths = {1000, 10'000, 100'000};
  if (arguments.given("tokens")) lengths = {static_cast<Index>(arguments.integer("tokens", 1))};

  std::printf("%-18s %8s %7s %10s %10s %10s %8s %9s\n", "method", "T", "sweeps", "error",
              "1 thread", "2 threads", "1 : 2", "us/sweep");
  std::vector<std::vector<Result>> results;
  bool good = true;
  for (const Index tokens : lengths) {
    const Problem p = make_problem(tokens, size, gain);
    Matrix<double> want(tokens, size);
    const double loop =
        fastest(rounds, [&] { eb::rnn_tanh_forward(p.u, p.weight, p.initial, want); });
    std::printf("%-18s %8lld %7s %10s %8.2fms %10s %8s %9s\n", "step by step",
                static_cast<long long>(tokens), "", "", 1e3 * loop, "", "", "");
    results.emplace_back();
    for (const Method& m : kMethods) {
      const Result r = solve(p, want, m.method, rounds);
      const bool found = r.status.converged && r.error < 1e-6;
      good = good && found;
      std::printf("%-18s %8lld %7lld %10.1e %8.2fms %8.2fms %8.2f %9.1f%s\n", m.name,
                  static_cast<long long>(tokens), static_cast<long long>(r.status.sweeps), r.error,
                  1e3 * r.seconds[0], 1e3 * r.seconds[1], r.seconds[0] / r.seconds[1],
                  1e6 * r.seconds[0] / static_cast<double>(r.status.sweeps),
                  found                ? ""
                  : r.status.fell_back ? "   fell back"
                                       : "   OFF");
      results.back().push_back(r);
    }
  }
  const std::string path = arguments.text("out") + "/deer.svg";
  draw(path, lengths, results, size, gain);
  std::printf("wrote %s\n", path.c_str());
  if (!good) std::printf("not every solve agrees with the sequential states by itself\n");
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("07_deer", run, argc, argv); }
