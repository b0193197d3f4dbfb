/* A CUDA driver and runtime that know one thing: a GPU of compute capability MAJOR.0 exists. Preloaded as libcuda.so.1,
it lets torch answer which of its kernels it would choose; nothing can be launched. */
#include <string.h>

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 0; }

/* Offsets in cudaDeviceProp, which are the same in CUDA 12 and 13. */
int cudaGetDeviceProperties(char *properties, int device) {
    const int warp_size = 32, major = MAJOR;
    memset(properties, 0, 720);
    memcpy(properties + 308, &warp_size, sizeof warp_size);
    memcpy(properties + 360, &major, sizeof major);
    return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }
