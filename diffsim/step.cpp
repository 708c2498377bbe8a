// A control step of many environments. Before this file codegen.py defines T, its number type, and NQ, NV, NU; for the
// functions at the end also FORWARD_PARTS and BACKWARD_PARTS, which name the functions that make a substep, and
// FORWARD_PLACES and BACKWARD_PLACES, the length of the array s they work on.
// A V holds LANES environments, in CUDA one. Arrays are (rows, n), as PyTorch has them.
#ifdef __CUDACC__
#define HERE static __device__ __noinline__
#define ALL extern "C" __global__
#define LANES 1
#define COPY memcpy
typedef T V;
static __device__ V wide(T x) { return x; }
#else
#define HERE __attribute__((visibility("hidden")))
#define ALL extern "C"
#define COPY __builtin_memcpy
typedef T V __attribute__((vector_size(LANES * sizeof(T))));
static inline V wide(T x) { return x - V{}; }
#endif

#if defined(__CUDACC__)
#define FUNCTION(f) HERE V f##_(V x) { return f(x); }
#elif defined(FORWARD_PARTS)
#include <ATen/cpu/vec/vec.h>
typedef at::vec::Vectorized<T> Vector;  // PyTorch's own vector functions
#define FUNCTION(f)                                                                               \
  HERE V f##_(V x) {                                                                              \
    T each[LANES];                                                                                \
    COPY(each, &x, sizeof x);                                                                     \
    for (int i = 0; i < LANES; i += Vector::size()) Vector::loadu(each + i).f().store(each + i);  \
    COPY(&x, each, sizeof x);                                                                     \
    return x;                                                                                     \
  }
#else
#define FUNCTION(f) HERE V f##_(V x);
#endif
FUNCTION(exp)
FUNCTION(log1p)
FUNCTION(sin)
FUNCTION(cos)
FUNCTION(sqrt)

#define PART(name) HERE void name(V* s);
#define CALL(name) name(s);
#ifdef FORWARD_PARTS
FORWARD_PARTS(PART)
BACKWARD_PARTS(PART)

// Rows of an array to or from s, of the environments from `first` on.
HERE void load(V* s, const T* x, int rows, long n, long first) {
  const long left = n - first;
  for (int i = 0; i < rows; i++)
    if (left >= LANES) COPY(s + i, x + i * n + first, sizeof(V));
    else COPY(s + i, x + i * n + first, left * sizeof(T));
}

HERE void store(const V* s, T* x, int rows, long n, long first) {
  const long left = n - first;
  for (int i = 0; i < rows; i++)
    if (left >= LANES) COPY(x + i * n + first, s + i, sizeof(V));
    else COPY(x + i * n + first, s + i, left * sizeof(T));
}

// s: qpos, qvel, ctrl of a substep; behind them the new qpos, qvel. states: what each substep began with.
HERE void forward_block(V* s, const T* qpos, const T* qvel, const T* ctrl, T* states, T* new_qpos, T* new_qvel,
                        int substeps, long n, long first) {
  load(s, qpos, NQ, n, first);
  load(s + NQ, qvel, NV, n, first);
  load(s + NQ + NV, ctrl, NU, n, first);
  for (int k = 0; k < substeps; k++) {
    store(s, states + k * (NQ + NV) * n, NQ + NV, n, first);
    FORWARD_PARTS(CALL)
    for (int i = 0; i < NQ + NV; i++) s[i] = s[NQ + NV + NU + i];
  }
  store(s, new_qpos, NQ, n, first);
  store(s + NQ, new_qvel, NV, n, first);
}

// s: qpos, qvel, ctrl, the new qvel, gradients of the new qpos, qvel; behind them those of qpos, qvel, ctrl.
HERE void backward_block(V* s, const T* states, const T* new_qvel, const T* ctrl, const T* of_new_qpos,
                         const T* of_new_qvel, T* of_qpos, T* of_qvel, T* of_ctrl, int substeps, long n, long first) {
  V *x = s + NQ + NV + NU, *gradient = x + NV, *result = gradient + NQ + NV, *sum = s + BACKWARD_PLACES;
  load(s + NQ + NV, ctrl, NU, n, first);
  load(x, new_qvel, NV, n, first);
  load(gradient, of_new_qpos, NQ, n, first);
  load(gradient + NQ, of_new_qvel, NV, n, first);
  for (int i = 0; i < NU; i++) sum[i] = wide(0);
  V used = wide(0);
  for (int i = 0; i < NQ + NV; i++) used = gradient[i] != 0 ? wide(1) : used;
  for (int k = substeps - 1; k >= 0; k--) {
    load(s, states + k * (NQ + NV) * n, NQ + NV, n, first);
    BACKWARD_PARTS(CALL)
    for (int i = 0; i < NQ + NV; i++) gradient[i] = result[i];
    for (int i = 0; i < NU; i++) sum[i] += result[NQ + NV + i];
    for (int i = 0; i < NV; i++) x[i] = s[NQ + i];
  }
  for (int i = 0; i < NQ + NV; i++) gradient[i] = used > 0 ? gradient[i] : wide(0);  // 0 in, 0 out: see Eager
  for (int i = 0; i < NU; i++) sum[i] = used > 0 ? sum[i] : wide(0);
  store(gradient, of_qpos, NQ, n, first);
  store(gradient + NQ, of_qvel, NV, n, first);
  store(sum, of_ctrl, NU, n, first);
}

#ifdef __CUDACC__
#define FOR_EACH_BLOCK(places) V s[places]; const long first = blockIdx.x * (long)blockDim.x + threadIdx.x; if (first < n)
#else
#define FOR_EACH_BLOCK(places) static thread_local V s[places]; for (long first = 0; first < n; first += LANES)
#endif

ALL void forward(const T* qpos, const T* qvel, const T* ctrl, T* states, T* new_qpos, T* new_qvel, int substeps,
                 int n) {
  FOR_EACH_BLOCK(FORWARD_PLACES) forward_block(s, qpos, qvel, ctrl, states, new_qpos, new_qvel, substeps, n, first);
}

ALL void backward(const T* states, const T* new_qvel, const T* ctrl, const T* of_new_qpos, const T* of_new_qvel,
                  T* of_qpos, T* of_qvel, T* of_ctrl, int substeps, int n) {
  FOR_EACH_BLOCK(BACKWARD_PLACES + NU)
  backward_block(s, states, new_qvel, ctrl, of_new_qpos, of_new_qvel, of_qpos, of_qvel, of_ctrl, substeps, n, first);
}
#endif
