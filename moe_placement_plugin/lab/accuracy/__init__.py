"""The same lm-eval tasks under the stock engine and under each strategy, compared answer by answer."""
