"""custom.py in Keras."""

import jax
import keras
import optax
from keras import layers, ops
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split


class Radial(layers.Layer):
    """How near each of several centres is: `(..., inputs)` to `(..., features)`. Broomhead and Lowe 1988."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def build(self, input_shape):
        normal = keras.initializers.RandomNormal(stddev=1.0)
        self.centres = self.add_weight(shape=(self.features, input_shape[-1]), initializer=normal)
        self.width = self.add_weight(shape=(self.features,), initializer="ones")

    def call(self, x):
        return ops.exp(-self.width * ops.mean((x[..., None, :] - self.centres) ** 2, -1))


def quantiles(target, outputs, levels=(0.1, 0.9)):
    """Small where a share of `levels` of the targets lies below each output. Koenker and Bassett 1978."""
    levels = ops.array(levels)
    missed = target - outputs
    return ops.sum(ops.maximum(levels * missed, (levels - 1) * missed), -1)


class Coverage(keras.metrics.Metric):
    """The share of targets that lie between the bounds."""

    def __init__(self, name="coverage"):
        super().__init__(name=name)
        self.inside = self.add_variable(shape=(), initializer="zeros", name="inside")
        self.count = self.add_variable(shape=(), initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        inside = (y_pred[:, 0] < y_true[:, 0]) & (y_true[:, 0] < y_pred[:, 1])
        self.inside.assign_add(ops.sum(ops.cast(inside, "float32")))
        self.count.assign_add(ops.cast(ops.shape(y_true)[0], "float32"))

    def result(self):
        return self.inside / self.count


class SharpnessAware(keras.Model):
    """The gradient is that of the worst parameters nearby. Foret et al. 2021."""

    def __init__(self):
        super().__init__()
        self.near, self.bounds = Radial(32), layers.Dense(2)

    def call(self, x, training=False):
        return self.bounds(self.near(x))

    def train_step(self, state, data):
        trainable, frozen, optimizer, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)

        def loss(trainable):
            outputs, _ = self.stateless_call(trainable, frozen, x, training=True)
            return self.compute_loss(x, y, outputs), outputs

        (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        reach = 0.05 / optax.tree.norm(gradient)
        worst = [p + reach * g for p, g in zip(trainable, gradient, strict=True)]
        gradient = jax.grad(loss, has_aux=True)(worst)[0]
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradient, trainable)

        logs, updated = {}, []
        for metric in self.metrics:
            own = metrics[len(updated) : len(updated) + len(metric.variables)]
            own = metric.stateless_update_state(own, *((value,) if metric.name == "loss" else (y, outputs)))
            result = metric.stateless_result(own)
            logs |= result if isinstance(result, dict) else {metric.name: result}
            updated += own
        return logs, (trainable, frozen, optimizer, updated)


def main():
    x, y = load_diabetes(return_X_y=True)
    data = train_test_split(x / x.std(0), (y - y.mean()) / y.std(), test_size=0.3, random_state=0)
    x_train, x_test, y_train, y_test = data

    model = SharpnessAware()
    model.compile(keras.optimizers.Adam(3e-3), quantiles, metrics=[Coverage()])
    model.fit(x_train, y_train[:, None], epochs=30)
    return model.evaluate(x_test, y_test[:, None], return_dict=True)


if __name__ == "__main__":
    print(main())
