"""Operations on their way to a service: in what order they are sent, how they are waited for, and whether it still answers."""
