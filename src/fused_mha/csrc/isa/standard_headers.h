// The standard headers that the kernels use, before any code of a target: their inline functions must not be compiled
// for an instruction set that the machine may lack.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
