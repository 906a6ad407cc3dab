/* Backpropagation by hand, in C: 4-4-4-3, tanh, softmax cross-entropy, two steps of gradient descent over 5 samples.
   The argument names a mistake; "right" makes none. It prints the arrays of a golden file as JSON. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "given.h"

enum { N = 5, D = 4, K = 3, L = 3 };

static const char *mistake;
static int first = 1;

static int is(const char *name) { return strcmp(mistake, name) == 0; }

static void print(const char *kind, int layer, int t, const double *a, int n, int m) {
    printf("%s\"%s_%s.%d\": [", first ? "" : ",\n", kind, layer == L - 1 ? "o" : layer == 1 ? "2" : "1", t);
    first = 0;
    for (int i = 0; i < n; i++) {
        if (m) printf("%s[", i ? ", " : "");
        for (int j = 0; j < (m ? m : 1); j++) printf("%s%.17g", j || (!m && i) ? ", " : "", a[m ? i * m + j : i]);
        if (m) printf("]");
    }
    printf("]");
}

int main(int argc, char **argv) {
    double *W[L] = {W_1, W_2, W_o}, *b[L] = {b_1, b_2, b_o};
    static double z[L][N * D], h[L + 1][N * D], delta[N * D], dh[N * D], dW[L][D * D], db[L][D];
    const int size[L + 1] = {D, D, D, K};
    mistake = argc > 1 ? argv[1] : "right";
    memcpy(h[0], X, sizeof X);
    printf("{");
    for (int t = 1; t <= 2; t++) {
        for (int k = 0; k < L; k++) {
            int in = size[k], out = size[k + 1];
            for (int s = 0; s < N; s++)
                for (int j = 0; j < out; j++) {
                    double sum = is("bias") ? 0 : b[k][j];
                    for (int i = 0; i < in; i++) sum += h[k][s * in + i] * W[k][i * out + j];
                    z[k][s * out + j] = sum;
                    h[k + 1][s * out + j] = k < L - 1 ? tanh(sum) : sum;
                }
        }
        for (int s = 0; s < N; s++) {
            double sum = 0;
            for (int j = 0; j < K; j++) sum += exp(h[L][s * K + j]);
            for (int j = 0; j < K; j++) {
                double p = exp(h[L][s * K + j]) / sum;
                delta[s * K + j] = (p - (is("no_y") ? 0 : y[s] == j)) / (is("sum") ? 1 : N);
            }
        }
        for (int k = L - 1; k >= 0; k--) {
            int in = size[k], out = size[k + 1];
            if (!is("accumulated")) {
                memset(dW[k], 0, sizeof dW[k]);
                memset(db[k], 0, sizeof db[k]);
            }
            for (int s = 0; s < N; s++)
                for (int j = 0; j < out; j++) {
                    double d = delta[s * out + j];
                    for (int i = 0; i < in; i++) dW[k][i * out + j] += h[k][s * in + i] * d / (is("mean_twice") ? N : 1);
                    db[k][j] = is("last_sample") ? d : db[k][j] + d / (is("db_mean") ? N : 1);
                }
            print("dW", k, t, dW[k], in, out);
            print("db", k, t, db[k], out, 0);
            if (k == 0) break;
            for (int s = 0; s < N; s++)
                for (int i = 0; i < in; i++) {
                    double sum = 0, a = h[k][s * in + i];
                    for (int j = 0; j < out; j++)
                        sum += delta[s * out + j] * W[k][is("transposed") && in == out ? j * out + i : i * out + j];
                    if (is("phi_of_h")) a = tanh(a);
                    dh[s * in + i] = sum * (is("phi_prime") ? 1 : 1 - a * a);
                }
            memcpy(delta, dh, sizeof delta);
        }
        for (int k = 0; k < L; k++) {
            double eta = is("ascent") ? -0.1 : 0.1;
            for (int i = 0; i < size[k] * size[k + 1]; i++) W[k][i] -= eta * dW[k][i];
            for (int j = 0; j < size[k + 1]; j++) b[k][j] -= eta * db[k][j];
            print("W", k, t + 1, W[k], size[k], size[k + 1]);
            print("b", k, t + 1, b[k], size[k + 1], 0);
        }
    }
    printf("}\n");
    return 0;
}
