// A small SVG writer: shapes, text and a colour scale.  Coordinates are pixels, y grows downwards.
#pragma once

#include "arguments.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace example {

/// printf into a string.
template <class... Args>
std::string format(const char* pattern, Args... args) {
  const int size = std::snprintf(nullptr, 0, pattern, args...);
  std::string text(static_cast<std::size_t>(std::max(size, 0)) + 1, '\0');
  std::snprintf(text.data(), text.size(), pattern, args...);
  text.pop_back();
  return text;
}

/// Dark violet (t = 0) over green to yellow (t = 1), in even steps of lightness.
inline std::string heat_colour(double t) {
  static constexpr std::array<std::array<double, 3>, 6> kStops = {
      {{68, 1, 84}, {65, 68, 135}, {42, 120, 142}, {34, 168, 132}, {122, 209, 81}, {253, 231, 37}}};
  const double at = std::clamp(t, 0.0, 1.0) * (kStops.size() - 1);
  const auto low = std::min(static_cast<std::size_t>(at), kStops.size() - 2);
  const double part = at - static_cast<double>(low);
  const auto mix = [&](std::size_t c) {
    return static_cast<int>(std::lround(std::lerp(kStops[low][c], kStops[low + 1][c], part)));
  };
  return format("rgb(%d,%d,%d)", mix(0), mix(1), mix(2));
}

struct TextStyle {
  double size = 13;
  const char* anchor = "start";  ///< start, middle, end
  std::string colour = "#222";
  bool bold = false;
};

struct Stroke {
  std::string colour = "#222";
  double width = 1;
  std::string dash = "";  ///< such as "6 4"; empty is solid
};

class Svg {
 public:
  using Points = std::vector<std::pair<double, double>>;

  Svg(double width, double height)
      : body_(format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
                     "width=\"%.0f\" height=\"%.0f\" font-family=\"sans-serif\">\n",
                     width, height, width, height)) {
    rect(0, 0, width, height, "white");
  }

  void text(double x, double y, const std::string& words, const TextStyle& style = {}) {
    body_ += format("<text x=\"%.1f\" y=\"%.1f\" font-size=\"%.1f\" text-anchor=\"%s\" fill=\"%s\"",
                    x, y, style.size, style.anchor, style.colour.c_str());
    body_ += style.bold ? " font-weight=\"bold\">" : ">";
    for (const char c : words) {
      body_ += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
    }
    body_ += "</text>\n";
  }

  void line(double x0, double y0, double x1, double y1, const Stroke& stroke = {}) {
    polyline({{x0, y0}, {x1, y1}}, stroke);
  }

  void polyline(const Points& points, const Stroke& stroke = {}) {
    body_ += "<polyline fill=\"none\" points=\"";
    for (const auto& [x, y] : points) body_ += format("%.1f,%.1f ", x, y);
    body_ += format("\" stroke=\"%s\" stroke-width=\"%.1f\"", stroke.colour.c_str(), stroke.width);
    if (!stroke.dash.empty()) body_ += " stroke-dasharray=\"" + stroke.dash + "\"";
    body_ += "/>\n";
  }

  void circle(double x, double y, double radius, const std::string& fill) {
    body_ += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"%s\"/>\n", x, y, radius,
                    fill.c_str());
  }

  void rect(double x, double y, double width, double height, const std::string& fill) {
    body_ += format("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n", x,
                    y, width, height, fill.c_str());
  }

  void save(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    file << body_ << "</svg>\n";
    file.close();
    if (!file) throw usage_error("cannot write " + path);
  }

 private:
  std::string body_;
};

}  // namespace example
