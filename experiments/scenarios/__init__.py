"""The three scenarios on split MNIST."""
