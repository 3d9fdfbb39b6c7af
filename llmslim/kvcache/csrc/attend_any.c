#define MACHINE(name) name##_any
#define SIZE 0   /* bits of its registers; 0: not known */
#include "attend_loops.h"
