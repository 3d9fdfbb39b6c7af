#define MACHINE(name) name##_any
#define SIZE 128   /* bits of the registers that any machine has */
#include "attend_loops.h"
