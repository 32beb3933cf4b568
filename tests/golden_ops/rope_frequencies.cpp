// Frequencies and what they carry: rope_inv_freq, logn_scale, rope_decay_curve, rope_max_context,
// rope_min_base.
#include "support/golden.hpp"

#include <eigenblocks/position/base_bound.hpp>
#include <eigenblocks/position/frequency_scaling.hpp>
#include <eigenblocks/position/logn.hpp>

#include <optional>
#include <stdexcept>
#include <string>

namespace {

using namespace eigenblocks;

template <class C>
std::optional<double> given_attention_factor(C& c) {
  if (!c.has_param("attention_factor")) return std::nullopt;
  return c.param_real("attention_factor");
}

template <class C>
RotaryFrequencies frequencies_of(C& c) {
  const std::string type = c.param("type");
  const Index rotary_dim = c.param_int("rotary_dim");
  const double base = c.param_real("base", 10000.0);
  const auto factor = [&](double fallback = 1.0) { return c.param_real("factor", fallback); };
  const auto trained = [&] { return c.param_int("original_max_position"); };
  c.has_param("max_position");  // informative
  if (type == "default") return rope_frequencies(rotary_dim, base);
  if (type == "linear") return linear_frequencies(rotary_dim, base, {.factor = factor()});
  if (type == "ntk_aware") return ntk_aware_frequencies(rotary_dim, base, {.factor = factor()});
  if (type == "ntk_radix") return ntk_radix_frequencies(rotary_dim, base, {.factor = factor()});
  if (type == "ntk_fixed") return ntk_fixed_frequencies(rotary_dim, base, {.factor = factor()});
  if (type == "ntk_mixed") {
    return ntk_mixed_frequencies(
        rotary_dim, base,
        {.factor = factor(), .exponent = c.param_real("ntk_exponent", NtkMixedOptions{}.exponent)});
  }
  if (type == "dynamic_ntk") {
    return dynamic_ntk_frequencies(rotary_dim, base,
                                   {.factor = factor(),
                                    .original_max_position = trained(),
                                    .seq_len = c.param_int("seq_len", 0)});
  }
  if (type == "ntk_by_parts") {
    const NtkByPartsOptions standard;
    return ntk_by_parts_frequencies(rotary_dim, base,
                                    {.factor = factor(),
                                     .original_max_position = trained(),
                                     .beta_fast = c.param_real("beta_fast", standard.beta_fast),
                                     .beta_slow = c.param_real("beta_slow", standard.beta_slow)});
  }
  if (type == "yarn") {
    const YarnOptions standard;
    return yarn_frequencies(
        rotary_dim, base,
        {.factor = factor(),
         .original_max_position = trained(),
         .beta_fast = c.param_real("beta_fast", standard.beta_fast),
         .beta_slow = c.param_real("beta_slow", standard.beta_slow),
         .truncate = c.param_flag("truncate", standard.truncate),
         .mscale = c.param_real("mscale", standard.mscale),
         .mscale_all_dim = c.param_real("mscale_all_dim", standard.mscale_all_dim),
         .attention_factor = given_attention_factor(c)});
  }
  if (type == "longrope") {
    return longrope_frequencies(rotary_dim, base,
                                {.factor = factor(),
                                 .original_max_position = trained(),
                                 .seq_len = c.param_int("seq_len", 0),
                                 .short_factor = c.exact("in.short_factor"),
                                 .long_factor = c.exact("in.long_factor"),
                                 .attention_factor = given_attention_factor(c)});
  }
  if (type == "llama3") {
    const Llama3Options standard;
    return llama3_frequencies(
        rotary_dim, base,
        {.factor = factor(standard.factor),
         .original_max_position =
             c.param_int("original_max_position", standard.original_max_position),
         .low_freq_factor = c.param_real("low_freq_factor", standard.low_freq_factor),
         .high_freq_factor = c.param_real("high_freq_factor", standard.high_freq_factor)});
  }
  if (type == "proportional") {
    return proportional_frequencies(c.param_int("head_dim"), base,
                                    {.rotary_dim = rotary_dim, .factor = factor()});
  }
  throw std::runtime_error("type " + type + " is unknown");
}

template <class C>
void rope_inv_freq(C& c) {
  const RotaryFrequencies frequencies = frequencies_of(c);
  c.expect_exact("out.inv_freq", frequencies.inv_freq);
  c.expect_exact("out.attention_factor", frequencies.attention_factor);
}

template <class C>
void logn(C& c) {
  const std::string mode = c.param("mode");
  if (mode != "clipped" && mode != "plain") throw std::runtime_error("mode " + mode);
  const Vector<double> positions = c.exact("in.positions");
  c.expect("out.scale", logn_scale<golden::scalar_of<C>>(
                            positions, positions.size(), c.param_int("train_length"),
                            mode == "plain" ? LognMode::plain : LognMode::clipped));
}

RotaryFrequencies plain_frequencies(golden::Case<double>& c) {
  return rope_frequencies(c.param_int("dim"), c.param_real("base"));
}

void decay_curve(golden::Case<double>& c) {
  const std::string kind = c.param("kind");
  if (kind != "sum" && kind != "abel") throw std::runtime_error("kind " + kind + " is unknown");
  c.expect("out.f", rope_decay_curve(plain_frequencies(c), c.param_int("length"),
                                     kind == "sum" ? RopeDecay::sum : RopeDecay::abel));
}

void max_context(golden::Case<double>& c) {
  const auto found = rope_max_context(plain_frequencies(c), c.param_int("max_length"));
  c.expect_integers("out.first_negative", {found.value_or(-1)});
}

void min_base(golden::Case<double>& c) {
  const RopeMinBaseOptions options{.levels = static_cast<int>(c.param_int("levels")),
                                   .start = c.param_real("start")};
  const auto found = rope_min_base(c.param_int("length"), c.param_int("dim"), options);
  if (!found) throw std::runtime_error("no good base in the first level");
  c.expect("out.base", *found);
}

}  // namespace

void register_rope_frequencies(golden::Registry& registry) {
  const std::string bound = "a base bound in float is off by 0.06 rad at position 1e6";
  registry.add("rope_inv_freq", [](auto& c) { rope_inv_freq(c); });
  registry.add("logn_scale", [](auto& c) { logn(c); });
  registry.add_double("rope_decay_curve", bound, decay_curve);
  registry.add_double("rope_max_context", bound, max_context);
  registry.add_double("rope_min_base", bound, min_base);
}
