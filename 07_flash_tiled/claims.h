/* ./run claims: what a first call costs, and -1e9 against -inf as a mask. With --device, what needs one: TF32 on and off, a mask as
 * a tensor against the flag, and a clock that does not wait for what was launched. */
#ifndef CLAIMS_H
#define CLAIMS_H

/* Gets the words after "claims"; prints; returns the exit code: 1 if a claim does not hold. */
int run_claims(int argc, char **argv);

#endif
