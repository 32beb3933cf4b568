// The golden runner can fail: small fixtures that are wrong in one way each, and the line that says so.
#include <doctest/doctest.h>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/io/safetensors.hpp>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/golden.hpp"
#include "support/golden_run.hpp"
#include "support/temporary_folder.hpp"

namespace eb = eigenblocks;
using eb::Index;

namespace {

eb::RowVector<double> row(std::initializer_list<double> values) {
  return Eigen::Map<const eb::RowVector<double>>(values.begin(), static_cast<Index>(values.size()));
}

/// The metadata of a sound fixture; tensors are added by the test.
eb::SafetensorsWriter fixture(const std::string& op) {
  eb::SafetensorsWriter writer;
  writer.metadata("op", op).metadata("source", "this test");
  writer.metadata("atol", "1e-12").metadata("rtol", "1e-10");
  return writer;
}

/// A sound fixture of the op `scale`: y = factor x, gin.x = factor gout.y, and the entries of x counted.
eb::SafetensorsWriter sound_scale() {
  const std::vector<Index> count{3};
  eb::SafetensorsWriter writer = fixture("scale");
  writer.metadata("param.factor", "2.5")
      .add("in.x", row({1, -2, 4}))
      .add("out.y", row({2.5, -5, 10}));
  writer.add("gout.y", row({1, 0, 2}))
      .add("gin.x", row({2.5, 0, 5}))
      .add_integers("out.count", count);
  return writer;
}

/// Handlers for `scale`, and for ops that misbehave in a way of their own.
golden::Registry registry(golden::Compare compare = golden::Compare::elementwise) {
  golden::Registry ops;
  ops.add(
      "scale",
      [](auto& c) {
        using S = golden::scalar_of<decltype(c)>;
        const S factor = static_cast<S>(c.param_real("factor", 1.0));
        const eb::Matrix<S> x = c.matrix("in.x");
        c.expect("out.y", x * factor);
        c.form("twice");
        c.expect("out.y", eb::Matrix<S>(x * factor));
        if (c.has("out.count")) c.expect_integers("out.count", {x.size()});
        if (c.has("gin.x")) c.expect("gin.x", c.matrix("gout.y") * factor);
      },
      compare);
  ops.add("throws", [](auto&) { throw std::runtime_error("singular block"); });
  ops.add("throws_int", [](auto&) { throw 3; });
  ops.add("rounds", [](auto& c) { c.expect("out.y", static_cast<float>(c.exact("in.x")[0])); });
  ops.add("exact", [](auto& c) { c.expect_exact("out.y", c.exact("in.x")); });
  ops.add("floats_exactly",
          [](auto& c) { c.expect_exact("out.y", c.vector("in.x").template cast<double>()); });
  ops.add("first", [](auto& c) {
    c.expect_integers("out.i", {0, 1}, [](Index i) { return i == 1; });
  });
  ops.add("double_first", [](auto& c) { c.skip_float("needs 53 bits"), c.expect("out.y", 1.0); });
  ops.add_double("angles", "angles are computed in double",
                 [](auto& c) { c.expect("out.y", c.exact("in.x")); });
  return ops;
}

struct Outcome {
  golden::Totals totals;
  std::vector<std::string> lines;
  std::string text() const {
    std::string all;
    for (const auto& line : lines) all += line + "\n";
    return all;
  }
  /// Whether some line holds all of the words.
  bool says(std::initializer_list<std::string_view> words) const {
    for (const auto& line : lines) {
      bool all = true;
      for (const auto word : words) all = all && line.find(word) != line.npos;
      if (all) return true;
    }
    return false;
  }
};

/// A folder of fixtures and the runner on it.
class Golden {
 public:
  std::string write(const std::string& name, const eb::SafetensorsWriter& writer) {
    const std::string path = folder_.file(name);
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    writer.write(path);
    return path;
  }
  std::string write(const std::string& name, std::string_view text) {
    const std::string path = folder_.file(name);
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  Outcome run(golden::Options options = {}, const golden::Registry& ops = registry()) const {
    if (options.directories.empty()) options.directories = {folder_.path()};
    Outcome outcome;
    golden::Runner runner(ops, {{"mla", 6}}, options,
                          [&](const std::string& line) { outcome.lines.push_back(line); });
    outcome.totals = runner.run();
    return outcome;
  }
  Outcome run_float(const golden::Registry& ops = registry()) const {
    return run({.directories = {}, .in_float = true, .only = {}}, ops);
  }

 private:
  TemporaryFolder folder_;
};

/// The outcome of one fixture on its own.
Outcome run_one(const eb::SafetensorsWriter& writer, bool in_float = false,
                golden::Compare compare = golden::Compare::elementwise) {
  Golden golden;
  golden.write("case.safetensors", writer);
  return golden.run({.directories = {}, .in_float = in_float, .only = {}}, registry(compare));
}

void passes(const Outcome& outcome) {
  CAPTURE(outcome.text());
  CHECK(outcome.totals.passed == 1);
  CHECK(outcome.totals.failed + outcome.totals.skipped == 0);
}

void fails(const Outcome& outcome, std::initializer_list<std::string_view> words) {
  CAPTURE(outcome.text());
  CHECK(outcome.totals.failed == 1);
  CHECK(outcome.totals.passed + outcome.totals.skipped == 0);
  CHECK(outcome.says(words));
}

void skips(const Outcome& outcome, std::string_view reason) {
  CAPTURE(outcome.text());
  CHECK(outcome.totals.skipped == 1);
  CHECK(outcome.totals.passed + outcome.totals.failed == 0);
  CHECK(outcome.says({"skipped 1: ", reason}));
}

}  // namespace

TEST_CASE("a sound fixture passes, in double and in float") {
  passes(run_one(sound_scale()));
  passes(run_one(sound_scale(), true));
}

TEST_CASE("a value that is off fails and is described") {
  eb::SafetensorsWriter writer = fixture("scale");
  eb::Matrix<double> x = eb::Matrix<double>::Ones(2, 6), y = x;
  y(1, 4) = 1.25;
  writer.add("in.x", x, {2, 3, 2}).add("out.y", y, {2, 3, 2});
  const auto outcome = run_one(writer);
  fails(outcome, {"FAIL ", "case.safetensors [direct] out.y[1, 2, 0]: got 1, want 1.25, tolerance",
                  "1 of 12 are off"});
  fails(outcome, {"[twice] out.y[1, 2, 0]: got 1, want 1.25"});
  CHECK(outcome.lines.back() == "0 passed, 1 failed, 0 skipped");
}

TEST_CASE(
    "element-wise, each value has its own tolerance; in the max norm they share the largest") {
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({1e6, 1e-6}))
      .add("out.y", row({1e6, 1.01e-6}));  // off by 1e-8, 1e-10 of 1e6 is 1e-4
  fails(run_one(writer), {"out.y[1]"});
  passes(run_one(writer, false, golden::Compare::max_norm));
  eb::SafetensorsWriter off = fixture("scale");
  off.add("in.x", row({1e6, 1e-6})).add("out.y", row({1e6, 1.1e-4}));
  fails(run_one(off, false, golden::Compare::max_norm), {"out.y[1]", "tolerance 0.0001"});
}

TEST_CASE("infinities must match and NaN matches NaN only") {
  const double inf = HUGE_VAL, nan = std::nan(""), max = std::numeric_limits<double>::max();
  struct {
    double got, want;
    bool ok;
  } const table[] = {{inf, inf, true},  {-inf, -inf, true}, {nan, nan, true}, {inf, -inf, false},
                     {inf, max, false}, {max, inf, false},  {nan, 1, false},  {1, nan, false},
                     {nan, inf, false}, {inf, nan, false}};
  for (const auto& entry : table) {
    for (const bool in_float : {false, true}) {
      if (in_float && (entry.got == max || entry.want == max)) continue;
      eb::SafetensorsWriter writer = fixture("scale");
      writer.add("in.x", row({entry.got, 1})).add("out.y", row({entry.want, 1}));
      const auto outcome = run_one(writer, in_float);
      CAPTURE(entry.got);
      CAPTURE(entry.want);
      if (entry.ok) passes(outcome);
      if (!entry.ok) fails(outcome, {"out.y[0]"});
    }
  }
}

TEST_CASE("a NaN is reported before any error that is a number") {
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({0, std::nan(""), 1e9})).add("out.y", row({1e8, 1, 0}));
  fails(run_one(writer), {"out.y[1]: got nan, want 1", "3 of 3 are off"});
}

TEST_CASE("another number of entries fails") {
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({1, 2})).add("out.y", row({1, 2, 3}));
  fails(run_one(writer), {"[direct] out.y: got 2 entries, want 3"});
}

TEST_CASE("an integer that is off fails") {
  const std::vector<Index> three{4};
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({1, 2, 3})).add("out.y", row({1, 2, 3})).add_integers("out.count", three);
  fails(run_one(writer), {"[twice] out.count[0]: got 3, want 4, 1 of 1 are off"});
  fails(run_one(writer, true), {"out.count[0]: got 3, want 4"});
  eb::SafetensorsWriter real = fixture("scale");
  real.add("in.x", row({1, 2, 3})).add("out.y", row({1, 2, 3})).add("out.count", row({3}));
  fails(run_one(real), {"out.count is not an integer tensor"});
}

TEST_CASE("a gradient that is off fails") {
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({1}))
      .add("out.y", row({1}))
      .add("gout.y", row({1}))
      .add("gin.x", row({2}));
  fails(run_one(writer), {"gin.x[0]: got 1, want 2"});
}

TEST_CASE("what the handler does not know fails") {
  fails(run_one(sound_scale().metadata("param.shift", "1")), {"unknown parameter shift = 1"});
  fails(run_one(sound_scale().add("in.mask", row({1}))), {"unknown input tensor in.mask"});
  fails(run_one(sound_scale().add("gout.z", row({1}))), {"unknown input tensor gout.z"});
  fails(run_one(sound_scale().add("out.z", row({1}))), {"expected tensor out.z was not compared"});
  fails(run_one(sound_scale().add("gin.z", row({1}))), {"expected tensor gin.z was not compared"});
  fails(run_one(sound_scale().add("aux.z", row({1}))),
        {"tensor aux.z is neither in, out, gout nor gin"});
  fails(run_one(fixture("nobody").add("out.y", row({1}))), {"unknown op nobody"});
}

TEST_CASE("what the handler needs and the file lacks fails") {
  fails(run_one(fixture("scale").add("out.y", row({1}))),
        {"the handler threw: tensor in.x is not in the file"});
  fails(run_one(fixture("scale").add("in.x", row({1}))),
        {"expected tensor out.y is not in the file"});
  eb::SafetensorsWriter writer = fixture("scale");
  writer.add("in.x", row({1})).add("out.y", row({1})).add("gin.x", row({1}));
  fails(run_one(writer), {"the handler threw: tensor gout.y is not in the file"});
  fails(run_one(sound_scale().metadata("param.factor", "2.5x")), {"factor = 2.5x is not a number"});
  fails(run_one(fixture("throws")), {"the handler threw: singular block"});
  fails(run_one(fixture("throws_int")), {"the handler threw something"});
}

TEST_CASE("parameters are read strictly") {
  golden::Fixture file;
  file.params = {{"n", "12"},  {"x", "1e-05"},   {"yes", "1"},
                 {"two", "2"}, {"word", "half"}, {"half", "0.5"}};
  golden::Record record(file, false, golden::Compare::elementwise);
  golden::Case<float> c(record);
  CHECK(c.param_int("n") == 12);
  CHECK(c.param_real("x") == 1e-5);
  CHECK(c.param_real("n") == 12.0);
  CHECK(c.param_flag("yes"));
  CHECK(c.param("word") == "half");
  CHECK(c.param("none", "full") == "full");
  CHECK(c.param_int("none", -1) == -1);
  CHECK(c.param_real("none", 0.5) == 0.5);
  CHECK_FALSE(c.param_flag("none", false));
  CHECK(c.has_param("n"));
  CHECK_FALSE(c.has_param("none"));
  CHECK_THROWS_WITH(c.param("none"), "parameter none is missing");
  CHECK_THROWS_WITH(c.param_int("half"), "half = 0.5 is not an integer");
  CHECK_THROWS_WITH(c.param_int("half", 3), "half = 0.5 is not an integer");
  CHECK_THROWS_WITH(c.param_flag("two"), "parameter two must be 0 or 1");
  CHECK_THROWS_WITH(c.param_real("word"), "word = half is not a number");
}

TEST_CASE("tensors arrive in the documented shapes") {
  const std::vector<Index> ids{7, 8};
  const std::vector<double> values{0, 1, 2, 3, 4, 5};
  golden::Fixture file;
  file.tensors["in.cube"] = {{3, 1, 2}, false, values, {}};
  file.tensors["in.row"] = {{6}, false, values, {}};
  file.tensors["in.scalar"] = {{}, false, {4}, {}};
  file.tensors["in.none"] = {{0, 4}, false, {}, {}};
  file.tensors["in.ids"] = {{2}, true, {7, 8}, ids};
  golden::Record record(file, false, golden::Compare::elementwise);
  golden::Case<float> c(record);
  CHECK(c.matrix("in.cube").rows() == 3);
  CHECK(c.matrix("in.cube")(2, 1) == 5.0f);
  CHECK(c.matrix("in.row").rows() == 1);
  CHECK(c.matrix("in.scalar")(0, 0) == 4.0f);
  CHECK(c.matrix("in.none").rows() == 0);
  CHECK(c.matrix("in.none").cols() == 4);
  CHECK(c.vector("in.cube").size() == 6);
  CHECK(c.exact("in.cube")[3] == 3.0);
  CHECK(c.shape("in.cube") == std::vector<Index>{3, 1, 2});
  CHECK(c.integers("in.ids") == ids);
  CHECK_THROWS_WITH(c.integers("in.row"), "tensor in.row does not hold integers");
  CHECK_THROWS_WITH(c.matrix("in.other"), "tensor in.other is not in the file");
}

TEST_CASE("a file that is no fixture fails") {
  const auto with = [](const std::string& key, const std::string& value) {
    return run_one(sound_scale().metadata(key, value));
  };
  fails(with("atol", "small"), {"atol = small is not a number"});
  fails(with("rtol", "-1"), {"atol and rtol must be finite and not negative"});
  fails(with("rtol", "inf"), {"atol and rtol must be finite and not negative"});
  fails(with("atol", "nan"), {"atol and rtol must be finite and not negative"});
  fails(with("parma.factor", "1"), {"unknown metadata parma.factor = 1"});
  eb::SafetensorsWriter bare;
  bare.metadata("op", "scale").add("in.x", row({1})).add("out.y", row({1}));
  fails(run_one(bare), {"metadata atol is missing"});
  fails(run_one(sound_scale().add_as<float>("in.y", row({1}))),
        {"tensor in.y is F32, fixtures hold F64 and I64"});
  fails(run_one(fixture("double_first")), {"expected tensor out.y is not in the file"});
  golden::Fixture nothing;
  golden::Record record(nothing, false, golden::Compare::elementwise);
  record.require_complete();
  CHECK(record.failures() == std::vector<std::string>{"[whole file] the file expects nothing"});
  Golden golden;
  golden.write("broken.safetensors", "not a header");
  fails(golden.run(), {"broken.safetensors eigenblocks: ", "the header length"});
}

TEST_CASE("one failure does not stop the others; areas and totals are counted") {
  Golden golden;
  golden.write("ssm/a.safetensors", fixture("throws"));
  golden.write("ssm/deep/b.safetensors", sound_scale());
  golden.write("rope/c.safetensors", sound_scale());
  golden.write("rope/d.safetensors", sound_scale());
  golden.write("rope/e.safetensors", fixture("mla"));
  golden.write("rope/README.md", "# not a case");
  const auto outcome = golden.run();
  const std::vector<std::string> tail(outcome.lines.end() - 5, outcome.lines.end());
  CHECK(tail == std::vector<std::string>{
                    "deep: 1 passed, 0 failed, 0 skipped", "rope: 2 passed, 0 failed, 1 skipped",
                    "ssm: 0 passed, 1 failed, 0 skipped", "skipped 1: ops of issue 6",
                    "3 passed, 1 failed, 1 skipped"});
}

TEST_CASE("directories: several, missing, empty") {
  Golden one, two;
  const auto first = std::filesystem::path(one.write("a.safetensors", sound_scale())).parent_path();
  const auto second =
      std::filesystem::path(two.write("a.safetensors", sound_scale())).parent_path();
  CHECK(one.run({.directories = {first, second}, .in_float = false, .only = {}}).totals.passed ==
        2);
  const auto missing =
      one.run({.directories = {first, first / "none"}, .in_float = false, .only = {}});
  CHECK(missing.totals.passed == 1);
  CHECK(missing.totals.failed == 1);
  CHECK(missing.says({"FAIL ", "/none there is no such directory"}));
  CHECK(Golden().run().lines == std::vector<std::string>{"0 passed, 0 failed, 0 skipped"});
}

TEST_CASE("only some ops") {
  Golden golden;
  golden.write("a.safetensors", sound_scale());
  golden.write("b.safetensors", fixture("throws"));
  const auto outcome = golden.run({.directories = {}, .in_float = false, .only = {"scale"}});
  passes(outcome);
}

TEST_CASE("rows of .jsonl files") {
  Golden golden;
  golden.write("tokens/a.jsonl",
               "{\"op\": \"mla\"}\n\n{\"note\": \"no op\"}\n[1]\n{\"op\": "
               "\"nobody\"}\r\n{broken\n{\"op\": 3}\n{\"op\": \"scale\"}");
  golden.write("tokens/models/b.jsonl", "{\"op\": \"nobody\"}\n");
  golden.write("tokens/corpora/c.jsonl", "\"a document\"\n");
  golden.write("tokens/models/d.safetensors", "material");
  const auto outcome = golden.run();
  CAPTURE(outcome.text());
  CHECK(outcome.totals.skipped == 1);
  CHECK(outcome.totals.failed == 4);
  CHECK(outcome.says({"a.jsonl:5 unknown op nobody"}));
  CHECK(outcome.says({"a.jsonl:6 the row is not valid JSON"}));
  CHECK(outcome.says({"a.jsonl:7 the row's op is not a string"}));
  CHECK(outcome.says({"a.jsonl:8 op scale is an op of files, not of rows"}));
}

TEST_CASE("float tolerances: the max norm, 5e-5 for values and 5e-4 for gradients") {
  const auto with = [](double y, double gx) {
    eb::SafetensorsWriter writer = fixture("scale");
    writer.add("in.x", row({100, 1})).add("out.y", row({100, y}));
    writer.add("gout.y", row({100, 1})).add("gin.x", row({100, gx}));
    return run_one(writer, true);
  };
  passes(with(1.0049, 1.049));
  fails(with(1.0051, 1.0), {"out.y[1]", "tolerance 0.005"});
  fails(with(1.0, 1.051), {"gin.x[1]", "tolerance 0.05"});
}

TEST_CASE("float tolerances: a tensor of rounding errors is measured by the operands") {
  const auto off_by = [](double error, double size) {
    eb::SafetensorsWriter writer = fixture("scale");
    writer.add("in.x", row({0, 1000}))
        .add("out.y", row({error, size}))
        .metadata("param.factor", "0");
    return run_one(writer, true);
  };
  passes(off_by(2.4e-4, 0));  // 1/200 of 1000 is 5, 5e-5 of that 2.5e-4
  fails(off_by(2.6e-4, 0), {"out.y[0]", "tolerance 0.00025"});
  fails(off_by(0, 2e-3),
        {"out.y[1]: got 0"});  // above 2^-20 of 1000 a tensor is measured by itself
}

TEST_CASE("float: what is exact stays exact") {
  eb::SafetensorsWriter exact = fixture("exact");
  exact.add("in.x", row({1.0 / 3.0})).add("out.y", row({1.0 / 3.0}));
  passes(run_one(exact, true));
  eb::SafetensorsWriter rounded = fixture("floats_exactly");
  rounded.add("in.x", row({1.0 / 3.0})).add("out.y", row({1.0 / 3.0}));
  passes(run_one(rounded));
  fails(run_one(rounded, true), {"out.y[0]"});
}

TEST_CASE("float: an index may differ where the handler calls it a tie, in float only") {
  const auto with = [](Index first, Index second) {
    const std::vector<Index> indices{first, second};
    eb::SafetensorsWriter writer = fixture("first");
    writer.add_integers("out.i", indices);
    return writer;
  };
  passes(run_one(with(0, 1), true));
  passes(run_one(with(0, 2), true));
  fails(run_one(with(0, 2)), {"out.i[1]: got 1, want 2"});
  fails(run_one(with(5, 2), true), {"out.i[0]: got 0, want 5, 1 of 2 are off"});
}

TEST_CASE("float skips by rule") {
  const auto with = [](double x) {
    eb::SafetensorsWriter writer = fixture("scale");
    writer.add("in.x", row({x, 1})).add("out.y", row({x, 1}));
    return writer;
  };
  for (const double outside : {1.1e15, -1e30, 0.9e-30, -1e-300}) {
    CAPTURE(outside);
    skips(run_one(with(outside), true), "holds values beyond 1e15 or below 1e-30");
    passes(run_one(with(outside)));
  }
  for (const double inside : {0.0, 1e15, 1e-30, HUGE_VAL, -HUGE_VAL}) {
    CAPTURE(inside);
    passes(run_one(with(inside), true));
  }
  for (const char* name :
       {"scale__huge.safetensors", "scale__junk_rows.safetensors", "extreme.safetensors"}) {
    Golden golden;
    golden.write(name, sound_scale());
    skips(golden.run_float(), "named huge, junk or extreme");
    passes(golden.run());
  }
  eb::SafetensorsWriter angles = fixture("angles");
  angles.add("in.x", row({1})).add("out.y", row({1}));
  skips(run_one(angles, true), "angles is double by nature: angles are computed in double");
  passes(run_one(angles));
  skips(run_one(fixture("double_first").add("out.y", row({1})), true), "needs 53 bits");
  passes(run_one(fixture("double_first").add("out.y", row({1}))));
  skips(run_one(fixture("mla"), true), "ops of issue 6");
}

TEST_CASE("float is really float") {
  eb::SafetensorsWriter writer = fixture("rounds");
  writer.add("in.x", row({1.0 / 3.0})).add("out.y", row({1.0 / 3.0}));
  fails(run_one(writer), {"out.y[0]: got 0.33333334"});
  passes(run_one(writer, true));
}

TEST_CASE("a skip does not hide a failure") {
  fails(run_one(fixture("double_first").add("out.y", row({2})), true), {"out.y[0]: got 1, want 2"});
}

TEST_CASE("an op has one handler") {
  golden::Registry ops = registry();
  CHECK_THROWS_WITH(ops.add("scale", [](auto&) {}), "two handlers for op scale");
}
