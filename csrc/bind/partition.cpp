// sadmoe._partition: the balanced assignment solver on numpy arrays. Every check of its arguments is here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>

#include "partition/assignment.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

// The array behind `object`, of that dtype and C-contiguous: nothing is converted, for that would hide a mistake.
template <class T>
py::array_t<T> array(const char* name, const py::object& object, int64_t ndim) {
  const std::string wanted = std::string(name) + " must be a C-contiguous, aligned numpy array of " + text(py::dtype::of<T>()) +
                             " with " + std::to_string(ndim) + (ndim == 1 ? " axis" : " axes");
  if (!py::isinstance<py::array>(object))
    throw py::type_error("assign: " + wanted + ", got " + text(py::type::of(object).attr("__name__")));
  const auto any = py::reinterpret_borrow<py::array>(object);
  if (!any.dtype().equal(py::dtype::of<T>())) throw py::type_error("assign: " + wanted + ", got " + text(any.dtype()));
  const bool aligned = any.attr("flags").attr("aligned").cast<bool>();
  if (any.ndim() != ndim || !(any.flags() & py::array::c_style) || !aligned)
    throw py::value_error("assign: " + wanted + ", got shape " + text(any.attr("shape")) + " with strides " +
                          text(any.attr("strides")));
  return py::reinterpret_borrow<py::array_t<T>>(any);
}

// A copy of an optional guess: the solver works in place.
template <class T>
py::array_t<T> guess(const char* name, const py::object& object, int64_t size, T otherwise) {
  py::array_t<T> copy(size);
  if (object.is_none()) {
    std::fill_n(copy.mutable_data(), size, otherwise);
    return copy;
  }
  const py::array_t<T> given = array<T>(name, object, 1);
  if (given.size() != size)
    throw py::value_error("assign: " + std::string(name) + " must have " + std::to_string(size) + " entries, got " +
                          std::to_string(given.size()));
  std::copy_n(given.data(), size, copy.mutable_data());
  return copy;
}

template <class T>
void check_range(const char* name, const py::array_t<T>& values, int64_t low, int64_t high, const char* advice) {
  const auto [least, most] = std::minmax_element(values.data(), values.data() + values.size());
  if (*least < low || *most > high)
    throw py::value_error("assign: " + std::string(name) + " must lie in [" + std::to_string(low) + ", " + std::to_string(high) +
                          "], got " + std::to_string(*least) + " to " + std::to_string(*most) + advice);
}

void raise_if_interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::tuple assign(const py::object& cost_object, const py::object& labels_object, const py::object& prices_object) {
  const auto cost = array<int32_t>("cost", cost_object, 2);
  const int64_t f = cost.shape(0), E = cost.shape(1);
  if (E < 1 || f < E || f % E != 0 || f > INT32_MAX)
    throw py::value_error("assign: cost must be [f, E] with E >= 1 a divisor of f >= 1, got " + text(cost.attr("shape")));
  check_range("cost", cost, -sadmoe::kMaxCost, sadmoe::kMaxCost, ": scale the costs down");
  auto labels = guess<int64_t>("labels", labels_object, f, -1);
  auto prices = guess<int32_t>("prices", prices_object, E, 0);
  check_range("labels", labels, -1, E - 1, " (-1: no guess)");
  check_range("prices", prices, 0, sadmoe::kMaxPrice, ": pass what an earlier call returned");
  const sadmoe::Assignment problem{f, E, cost.data(), labels.mutable_data(), prices.mutable_data()};
  {
    const py::gil_scoped_release release;
    sadmoe::solve(problem, raise_if_interrupted);
  }
  return py::make_tuple(labels, prices);
}

}  // namespace

PYBIND11_MODULE(_partition, m) {
  m.doc() = "Exact balanced assignment.";
  m.attr("MAX_COST") = sadmoe::kMaxCost;
  m.def("assign", assign, "cost"_a, "labels"_a = py::none(), "prices"_a = py::none(),
        R"(The labels of least total cost that give each of the E experts exactly f / E of the f rows.

cost: int32 [f, E], |cost| <= MAX_COST.   labels: int64 [f], a guess, -1 for none.   prices: int32 [E], a guess.
Guesses (what the call for a similar problem returned) only save time.
Returns labels int64 [f] and prices int32 [E], the proof of optimality: for every row i,
cost[i, labels[i]] + prices[labels[i]] is the least of cost[i] + prices. Deterministic; releases the GIL, and cost must
not be written to meanwhile.
Raises TypeError, ValueError on any other input.)");
}
