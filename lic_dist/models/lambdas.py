"""The lambdas that CompressAI trains with. Imports nothing: configurations read it."""

LAMBDAS = {
    "mse": (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800),
    "ms-ssim": (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00),
}
"""CompressAI's weights of distortion at qualities 1 to 8: of 255^2 MSE, and of 1 - MS-SSIM."""
