// What both mock drivers share: a log of calls, one JSON object a line; failures on demand; the code objects they know.
#pragma once
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 4

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// ---- the log -------------------------------------------------------------------------------------------------------

static char* text;
static size_t used, room;

static void write_log(const char* format, ...) {
  va_list args;
  pthread_mutex_lock(&lock);
  for (;;) {
    va_start(args, format);
    const size_t size = (size_t)vsnprintf(text ? text + used : NULL, room - used, format, args);
    va_end(args);
    if (size < room - used) {
      used += size;
      break;
    }
    room = 2 * (room + size) + 4096;
    text = realloc(text, room);
  }
  pthread_mutex_unlock(&lock);
}

EXPORT const char* mock_log(void) { return text ? text : ""; }

EXPORT void mock_clear(void) {
  pthread_mutex_lock(&lock);
  used = 0;
  if (text) text[0] = 0;
  pthread_mutex_unlock(&lock);
}

// Two hexadecimal digits a byte.
static char* hex(const void* data, size_t size) {
  char* out = malloc(2 * size + 1);
  out[0] = 0;
  for (size_t i = 0; i < size; ++i) sprintf(out + 2 * i, "%02x", ((const unsigned char*)data)[i]);
  return out;
}

// ---- what the machine is like --------------------------------------------------------------------------------------

static int devices = 2, multiprocessors = 100, major = 9;

EXPORT void mock_machine(int count, int units, int capability) {
  devices = count;
  multiprocessors = units;
  major = capability;
}

// ---- failures ------------------------------------------------------------------------------------------------------

static struct {
  char function[64];
  int code, skip, times;
} failure;

// Let calls of `function` fail with `code`: after `skip` more that do not, `times` of them.
EXPORT void mock_fail(const char* function, int code, int skip, int times) {
  pthread_mutex_lock(&lock);
  snprintf(failure.function, sizeof(failure.function), "%s", function);
  failure.code = code;
  failure.skip = skip;
  failure.times = times;
  pthread_mutex_unlock(&lock);
}

static int fails(const char* function) {
  int code = 0;
  pthread_mutex_lock(&lock);
  if (strcmp(failure.function, function) == 0 && failure.skip-- <= 0 && failure.times-- > 0) code = failure.code;
  pthread_mutex_unlock(&lock);
  return code;
}

// ---- code objects --------------------------------------------------------------------------------------------------

typedef struct {
  char name[64];
  int threads, args;  // most of a block; bytes of arguments
  int shared[MAX_DEVICES];  // CUDA: what a launch may ask for
  int loaded[MAX_DEVICES];  // CUDA: its code is there
} Kernel;

typedef struct {
  char name[64];
  char* bytes;
  size_t size;
  Kernel kernels[32];
  int count;
} Image;

static Image images[16];
static int num_images;

EXPORT void mock_image(const char* name, const char* bytes, size_t size) {
  Image* image = &images[num_images++];
  snprintf(image->name, sizeof(image->name), "%s", name);
  image->bytes = malloc(size);
  image->size = size;
  memcpy(image->bytes, bytes, size);
}

// A kernel of the image that was named last.
EXPORT void mock_kernel(const char* name, int threads, int args) {
  Image* image = &images[num_images - 1];
  Kernel* kernel = &image->kernels[image->count++];
  snprintf(kernel->name, sizeof(kernel->name), "%s", name);
  kernel->threads = threads;
  kernel->args = args;
}

static Image* identify(const void* data) {
  for (int i = 0; i < num_images; ++i)
    if (memcmp(data, images[i].bytes, images[i].size) == 0) return &images[i];
  return NULL;
}

static Kernel* look_up(Image* image, const char* name) {
  for (int i = 0; i < image->count; ++i)
    if (strcmp(image->kernels[i].name, name) == 0) return &image->kernels[i];
  return NULL;
}

static void log_launch(const char* kernel, int device, const unsigned* grid, const unsigned* block, unsigned shared,
                       const void* stream, int cluster, int overlap, int loaded, const void* args, size_t size) {
  char* bytes = hex(args, size);
  write_log("{\"call\": \"launch\", \"kernel\": \"%s\", \"device\": %d, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
            "\"shared\": %u, \"stream\": %llu, \"cluster\": %d, \"overlap\": %d, \"loaded\": %d, \"args\": \"%s\"}\n",
            kernel, device, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared,
            (unsigned long long)(uintptr_t)stream, cluster, overlap, loaded, bytes);
  free(bytes);
}
