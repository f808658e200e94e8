/* Public face of the Merkle kernel for C and for the generated binding. */
#ifndef JBM_MERKLE_H
#define JBM_MERKLE_H

#include <stddef.h>
#include <stdint.h>

#include "merkle_api.h"

#endif
