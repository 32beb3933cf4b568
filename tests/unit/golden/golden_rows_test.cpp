// Rows of *.jsonl files as golden cases: what passes, and each way of failing.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/golden_run.hpp"
#include "support/temporary_folder.hpp"

namespace {

golden::RowRegistry row_ops() {
  golden::RowRegistry rows;
  rows.add("double", [](golden::Row& row) {
    const auto x = row.get<std::vector<double>>("x");
    std::vector<double> y;
    for (const double value : x) y.push_back(2 * value);
    row.expect_near("y", y, 1e-9, 0);
    row.form("by hand");
    if (row.has("first")) row.expect("first", y.at(0));
  });
  rows.add("text",
           [](golden::Row& row) { row.expect("want", row.bytes("b64") + row.text("text")); });
  rows.add("none", [](golden::Row& row) { row.integer("x"); });
  rows.add("throws", [](golden::Row&) { throw std::runtime_error("singular block"); });
  rows.add("throws_int", [](golden::Row&) { throw 3; });
  rows.add("file",
           [](golden::Row& row) { row.expect("content", golden::read_bytes(row.path("name"))); });
  return rows;
}

struct RowOutcome {
  golden::Totals totals;
  std::string text;
};

RowOutcome run_rows(const std::string& lines, bool in_float = false) {
  TemporaryFolder folder;
  std::filesystem::create_directories(folder.path() / "tokens");
  std::ofstream(folder.path() / "tokens/a.jsonl", std::ios::binary) << lines;
  std::ofstream(folder.path() / "tokens/note.txt", std::ios::binary) << "a note";
  RowOutcome outcome;
  golden::Registry files;
  golden::Runner runner(
      files, {}, {.directories = {folder.path()}, .in_float = in_float, .only = {}},
      [&](const std::string& line) { outcome.text += line + "\n"; }, row_ops());
  outcome.totals = runner.run();
  return outcome;
}

void row_passes(const std::string& line) {
  const RowOutcome outcome = run_rows(line);
  CAPTURE(outcome.text);
  CHECK(outcome.totals.passed == 1);
  CHECK(outcome.totals.failed == 0);
}
void row_fails(const std::string& line, std::string_view words) {
  const RowOutcome outcome = run_rows(line);
  CAPTURE(outcome.text);
  CHECK(outcome.totals.passed == 0);
  CHECK(outcome.totals.failed == 1);
  CHECK(outcome.text.find(words) != std::string::npos);
}

}  // namespace

TEST_CASE("golden rows: sound ones") {
  row_passes(R"({"op":"double","source":"me","x":[1,2],"y":[2,4]})");
  row_passes(R"({"op":"double","x":[1],"y":[2.0000000001],"first":2})");
  row_passes(R"({"op":"double","x":[],"y":[]})");
  row_passes(R"({"op":"text","b64":"aGk=","text":"\u00e9","want":"hi\u00e9"})");
  row_passes(R"({"op":"file","name":"note.txt","content":"a note"})");
}

TEST_CASE("golden rows: each way of failing") {
  row_fails(R"({"op":"double","x":[1,2],"y":[2,4.1]})", "a.jsonl:1 [direct] y[1]: got 4, want 4.1");
  row_fails(R"({"op":"double","x":[1,2],"y":[2]})", "[direct] y: got 2 entries, want 1");
  row_fails(R"({"op":"double","x":[1],"y":2})", "[direct] y: got 1 entries");
  row_fails(R"({"op":"double","x":[1],"y":["2"]})", "y[0]: got 2, want \"2\"");
  row_fails(R"({"op":"double","x":[1],"y":[2],"first":3})", "[by hand] first: got 2.0, want 3");
  row_fails(R"({"op":"double","x":[1],"y":[2],"z":3})", "[whole row] unknown key z");
  row_fails(R"({"op":"double","x":[1]})", "the handler threw: key y is not in the row");
  row_fails(R"({"op":"double","x":"1","y":[2]})", "the handler threw: key x: ");
  row_fails(R"({"op":"none","x":1})", "[whole row] nothing was compared");
  row_fails(R"({"op":"none","x":1.5})", "key x is not an integer");
  row_fails(R"({"op":"text","b64":"a-k=","text":"","want":""})", "not base64");
  row_fails(R"({"op":"text","b64":"/w==","text":"","want":"x"})", "want: got");
  row_fails(R"({"op":"throws"})", "the handler threw: singular block");
  row_fails(R"({"op":"throws_int"})", "the handler threw something");
  row_fails(R"({"op":"file","name":"gone","content":""})", "cannot open");
  row_fails(R"({"op":"nobody"})", "unknown op nobody");
}

TEST_CASE("golden rows: counts, the float run, two handlers") {
  const std::string two =
      "{\"op\":\"double\",\"x\":[1],\"y\":[2]}\n{\"op\":\"double\",\"x\":[1],\"y\":[3]}\n";
  CHECK(run_rows(two).totals.passed == 1);
  CHECK(run_rows(two).totals.failed == 1);
  CHECK(run_rows(two, true).totals.skipped == 2);
  CHECK(run_rows(two, true).text.find("skipped 2: rows have no float form") != std::string::npos);
  golden::RowRegistry rows = row_ops();
  CHECK_THROWS_AS(rows.add("double", [](golden::Row&) {}), std::logic_error);
}

TEST_CASE("golden rows: a row of another file by its key") {
  TemporaryFolder folder;
  std::ofstream(folder.path() / "b.jsonl")
      << "{\"op\":\"a\",\"name\":\"x\"}\nbroken\n{\"op\":\"b\",\"name\":\"x\",\"k\":1}\n";
  CHECK(golden::find_row(folder.path(), "b", "name", "x")["k"] == 1);
  CHECK_THROWS_AS(golden::find_row(folder.path(), "c", "name", "x"), std::runtime_error);
}
