// A control step on many environments; codegen.py writes the substep's functions, and what this file is to know:
// T, its number type; NQ, NV; of the file with the functions below PLACES, PARTS and lists of the parts.
// A V holds the same number of LANES environments, in CUDA of one. Arrays are (rows, n), as PyTorch has them.
#ifdef __CUDACC__
#define HERE static __device__ __noinline__
#define ALL __global__
#define LANES 1
typedef T V;
static __device__ V wide(T x) { return x; }
#else
#define HERE __attribute__((visibility("hidden")))
#define ALL extern "C"
typedef T V __attribute__((vector_size(LANES * sizeof(T))));
static inline V wide(T x) { return x - V{}; }
#endif

#if defined(__CUDACC__)
#define FUNCTION(f) HERE V f##_(V x) { return f(x); }
#elif defined(FORWARD_PARTS)
#include <ATen/cpu/vec/vec.h>
typedef at::vec::Vectorized<T> Vector;  // PyTorch's own vector functions
#define FUNCTION(f)                                                                                   \
  HERE V f##_(V x) {                                                                                  \
    T each[LANES];                                                                                    \
    __builtin_memcpy(each, &x, sizeof x);                                                             \
    for (int i = 0; i < LANES; i += Vector::size()) Vector::loadu(each + i).f().store(each + i);      \
    __builtin_memcpy(&x, each, sizeof x);                                                             \
    return x;                                                                                         \
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
    if (left >= LANES) __builtin_memcpy(s + i, x + i * n + first, sizeof(V));
    else __builtin_memcpy(s + i, x + i * n + first, left * sizeof(T));
}

HERE void store(const V* s, T* x, int rows, long n, long first) {
  const long left = n - first;
  for (int i = 0; i < rows; i++)
    if (left >= LANES) __builtin_memcpy(x + i * n + first, s + i, sizeof(V));
    else __builtin_memcpy(x + i * n + first, s + i, left * sizeof(T));
}

// s: qpos, qvel, qfrc of a substep; behind them the new qpos, qvel. states: what each substep began with.
HERE void forward_block(V* s, const T* qpos, const T* qvel, const T* qfrc, T* states, T* new_qpos, T* new_qvel,
                        int substeps, long n, long first) {
  load(s, qpos, NQ, n, first);
  load(s + NQ, qvel, NV, n, first);
  load(s + NQ + NV, qfrc, NV, n, first);
  for (int k = 0; k < substeps; k++) {
    store(s, states + k * (NQ + NV) * n, NQ + NV, n, first);
    FORWARD_PARTS(CALL)
    for (int i = 0; i < NQ + NV; i++) s[i] = s[NQ + 2 * NV + i];
  }
  store(s, new_qpos, NQ, n, first);
  store(s + NQ, new_qvel, NV, n, first);
}

// s: qpos, qvel, qfrc, the new qvel, gradients of the new qpos, qvel; behind them those of qpos, qvel, qfrc.
HERE void backward_block(V* s, const T* states, const T* new_qvel, const T* qfrc, const T* of_new_qpos,
                         const T* of_new_qvel, T* of_qpos, T* of_qvel, T* of_qfrc, int substeps, long n, long first) {
  V *x = s + NQ + 2 * NV, *gradient = x + NV, *result = gradient + NQ + NV, *sum = s + BACKWARD_PLACES;
  load(s + NQ + NV, qfrc, NV, n, first);
  load(x, new_qvel, NV, n, first);
  load(gradient, of_new_qpos, NQ, n, first);
  load(gradient + NQ, of_new_qvel, NV, n, first);
  for (int i = 0; i < NV; i++) sum[i] = wide(0);
  for (int k = substeps - 1; k >= 0; k--) {
    load(s, states + k * (NQ + NV) * n, NQ + NV, n, first);
    BACKWARD_PARTS(CALL)
    for (int i = 0; i < NQ + NV; i++) gradient[i] = result[i];
    for (int i = 0; i < NV; i++) {
      sum[i] += result[NQ + NV + i];
      x[i] = s[NQ + i];
    }
  }
  store(gradient, of_qpos, NQ, n, first);
  store(gradient + NQ, of_qvel, NV, n, first);
  store(sum, of_qfrc, NV, n, first);
}

#ifdef __CUDACC__
#define FOR_EACH_BLOCK(places) V s[places]; const long first = blockIdx.x * (long)blockDim.x + threadIdx.x; if (first < n)
#else
#define FOR_EACH_BLOCK(places) static thread_local V s[places]; for (long first = 0; first < n; first += LANES)
#endif

ALL void forward(const T* qpos, const T* qvel, const T* qfrc, T* states, T* new_qpos, T* new_qvel, int substeps,
                 int n) {
  FOR_EACH_BLOCK(FORWARD_PLACES) forward_block(s, qpos, qvel, qfrc, states, new_qpos, new_qvel, substeps, n, first);
}

ALL void backward(const T* states, const T* new_qvel, const T* qfrc, const T* of_new_qpos, const T* of_new_qvel,
                  T* of_qpos, T* of_qvel, T* of_qfrc, int substeps, int n) {
  FOR_EACH_BLOCK(BACKWARD_PLACES + NV)
  backward_block(s, states, new_qvel, qfrc, of_new_qpos, of_new_qvel, of_qpos, of_qvel, of_qfrc, substeps, n, first);
}
#endif
