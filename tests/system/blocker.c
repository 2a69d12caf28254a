/* blocker FILE CALL RESTART MILLISECONDS

Holds FILE, says "ready NUMBER", and waits in one system call, given by its name; endlessly if MILLISECONDS is negative.
A child waits for a byte, or the end, of standard input, and then does what ends the wait. When the call has returned:
"RESULT ERRNO HANDLED MILLISECONDS CONTENTS", with the number of SIGUSR1s that were handled (RESTART: by SA_RESTART), how
long the call has taken, and the first three bytes of FILE. "unknown" if the kernel has no such call. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <mqueue.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile int handled;
static void handler(int number) { handled++; }

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static long number = -1, argument[6];

static void use(long call, long a, long b, long c, long d, long e, long f)
{
    long values[6] = { a, b, c, d, e, f };
    number = call;
    memcpy(argument, values, sizeof(values));
}

#define CALL(name, ...) USE(SYS_##name, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define USE(call, a, b, c, d, e, f, ...) use(call, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define IS(text) (!strcmp(name, text))

static int prepare_io_uring(int fd)
{
    struct io_uring_params parameters = { 0 };
    int ring = syscall(SYS_io_uring_setup, 4, &parameters);
    if (ring < 0) return -1;
    char *queue = mmap(NULL, parameters.sq_off.array + 16, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    entry->opcode = IORING_OP_POLL_ADD;
    entry->fd = fd;
    entry->poll32_events = POLLIN;
    ((unsigned *)(queue + parameters.sq_off.array))[0] = 0;
    __atomic_store_n((unsigned *)(queue + parameters.sq_off.tail), 1, __ATOMIC_RELEASE);
    return syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0) == 1 ? ring : -1;
}

static aio_context_t prepare_aio(int fd)
{
    static struct iocb block, *blocks[] = { &block };
    aio_context_t context = 0;
    block.aio_fildes = fd;
    block.aio_lio_opcode = IOCB_CMD_POLL;
    block.aio_buf = POLLIN;
    syscall(SYS_io_setup, 4, &context);
    syscall(SYS_io_submit, context, 1L, blocks);
    return context;
}

int main(int argc, char **argv)
{
    int timed = !strncmp(argv[2], "timed ", 6); /* by options of its sockets */
    const char *name = argv[2] + (timed ? 6 : 0);
    struct sigaction action = { .sa_handler = handler, .sa_flags = atoi(argv[3]) ? SA_RESTART : 0 };
    int milliseconds = atoi(argv[4]), endless = milliseconds < 0;
    struct timespec limit = { milliseconds / 1000, milliseconds % 1000 * 1000000L }, absolute, *time = &limit;
    struct timeval timeval = { milliseconds / 1000, milliseconds % 1000 * 1000L };
    unsigned long none = 0, usr1 = 1UL << (SIGUSR1 - 1), usr2 = 1UL << (SIGUSR2 - 1);
    struct { const unsigned long *mask; size_t size; } sixth = { &none, 8 };
    int data[2], full[2], pair[2], alive[2], locked[2], child, status;
    int *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct { long type; char text[8]; } text = { 1, "x" };
    struct sockaddr_un place = { .sun_family = AF_UNIX };
    struct epoll_event event = { .events = EPOLLIN };
    struct io_event events[1];
    struct io_uring_getevents_arg getevents = { 0 };
    struct sembuf down = { 0, -1, 0 }, up = { 0, 1, 0 };
    struct flock lock = { .l_type = F_WRLCK };
    char byte, page[4096], contents[4] = "", name_of_queue[64];
    struct iovec buffer = { &byte, 1 };
    struct mmsghdr message = { .msg_hdr = { .msg_iov = &buffer, .msg_iovlen = 1 } };
    siginfo_t info;
    fd_set set;

    sigaction(SIGUSR1, &action, NULL);
    pipe(data);
    pipe(full);
    pipe(alive);
    pipe(locked);
    fcntl(full[1], F_SETPIPE_SZ, 4096);
    fcntl(full[1], F_SETFL, O_NONBLOCK);
    while (write(full[1], &text, 1) > 0) {}
    fcntl(full[1], F_SETFL, 0);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    int caller = socket(AF_UNIX, SOCK_STREAM, 0);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), counter = eventfd(0, 0), epoll = epoll_create1(0);
    bind(listener, (struct sockaddr *)&place, sizeof(sa_family_t)); /* a name is chosen for it */
    listen(listener, 1);
    socklen_t size = sizeof(place);
    getsockname(listener, (struct sockaddr *)&place, &size);
    epoll_ctl(epoll, EPOLL_CTL_ADD, data[0], &event);
    int memory = memfd_create("lock", 0);
    char *link;
    asprintf(&link, "/proc/self/fd/%d", memory);
    int other = open(link, O_RDWR);
    int queue = IS("msgrcv") || IS("msgsnd") ? msgget(IPC_PRIVATE, 0600) : -1;
    int semaphore = strstr(name, "sem") == name ? semget(IPC_PRIVATE, 1, 0600) : -1;
    struct mq_attr attributes = { .mq_maxmsg = 1, .mq_msgsize = 8 };
    snprintf(name_of_queue, sizeof(name_of_queue), "/spfs-test-%d", getpid());
    mqd_t messages = mq_open(name_of_queue, O_RDWR | O_CREAT | O_EXCL, 0600, &attributes);
    mq_unlink(name_of_queue);
    struct pollfd polled = { .fd = data[0], .events = POLLIN };
    FD_ZERO(&set);
    FD_SET(data[0], &set);
    /* What waits for these gets them while it waits, or takes them itself. */
    if (IS("sigsuspend") || strstr(name, "_mask")) syscall(SYS_rt_sigprocmask, SIG_BLOCK, &usr1, NULL, 8L);
    if (IS("sigtimedwait")) syscall(SYS_rt_sigprocmask, SIG_BLOCK, &usr2, NULL, 8L);

    if (IS("msgsnd")) while (!msgsnd(queue, &text, 8, IPC_NOWAIT)) {}
    if (IS("sendto")) while (send(pair[0], page, sizeof(page), MSG_DONTWAIT) > 0) {}
    if (IS("connect")) {
        int result;
        do result = connect(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0), (struct sockaddr *)&place, size);
        while (!result);
    }
    if (timed) {
        for (int option = 0; option < 2; option++) {
            int fds[] = { pair[0], listener, caller };
            for (int i = 0; i < 3; i++)
                setsockopt(fds[i], SOL_SOCKET, option ? SO_RCVTIMEO : SO_SNDTIMEO, &timeval, sizeof(timeval));
        }
    }

    pid_t parent = getpid();
    child = fork();
    if (!child) {
        close(alive[1]);
        flock(other, LOCK_EX);
        fcntl(memory, F_SETLKW, &lock);
        write(locked[1], "x", 1);
        read(0, &byte, 1);
        write(data[1], "x", 1);
        read(full[0], page, sizeof(page));
        if (IS("recvfrom") || IS("recvmmsg") || (IS("read") && timed)) write(pair[1], "x", 1);
        if (IS("sendto")) while (recv(pair[1], page, sizeof(page), MSG_DONTWAIT) > 0) {}
        if (IS("connect")) accept(listener, NULL, NULL);
        if (IS("eventfd")) eventfd_write(counter, 1);
        if (IS("accept4")) connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&place, size);
        *word = 1;
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
        if (IS("msgrcv")) msgsnd(queue, &text, 1, 0);
        if (IS("msgsnd")) msgrcv(queue, &text, 8, 0, 0);
        if (semaphore >= 0) semop(semaphore, &up, 1);
        mq_send(messages, "x", 1, 0);
        if (IS("sigtimedwait") && getppid() == parent) kill(parent, SIGUSR2);
        flock(other, LOCK_UN);
        lock.l_type = F_UNLCK;
        fcntl(memory, F_SETLK, &lock);
        if (IS("wait4") || IS("waitid")) _exit(0);
        read(alive[0], &byte, 1); /* until the parent has ended, however that came */
        if (queue >= 0) msgctl(queue, IPC_RMID, NULL);
        if (semaphore >= 0) semctl(semaphore, 0, IPC_RMID);
        _exit(0);
    }
    read(locked[0], &byte, 1);

    if (endless) time = NULL;
    if (IS("read")) CALL(read, timed ? pair[0] : data[0], &byte, 1);
    if (IS("write")) CALL(write, full[1], &byte, 1);
    if (IS("eventfd")) CALL(read, counter, &sixth, 8);
    if (IS("recvfrom")) CALL(recvfrom, pair[0], &byte, 1);
    if (IS("recvmmsg")) CALL(recvmmsg, pair[0], &message, 1);
    if (IS("sendto")) CALL(sendto, pair[0], page, sizeof(page));
    if (IS("accept4")) CALL(accept4, listener);
    if (IS("connect")) CALL(connect, caller, &place, size);
    if (IS("msgsnd")) CALL(msgsnd, queue, &text, 8);
    if (IS("wait4")) CALL(wait4, child, &status);
    if (IS("waitid")) CALL(waitid, P_PID, child, &info, WEXITED);
    if (IS("flock")) CALL(flock, memory, LOCK_EX);
    if (IS("fcntl")) CALL(fcntl, memory, F_SETLKW, &lock);
    if (IS("msgrcv")) CALL(msgrcv, queue, &text, 8);
    if (IS("semop")) CALL(semop, semaphore, &down, 1);
    if (IS("semtimedop")) CALL(semtimedop, semaphore, &down, 1, time);
    if (IS("mq_timedreceive")) CALL(mq_timedreceive, messages, &text, 8, NULL, NULL);
    if (IS("sigsuspend")) CALL(rt_sigsuspend, &none, 8);
    if (IS("sigtimedwait")) CALL(rt_sigtimedwait, &usr2, &info, time, 8);
    if (IS("select")) CALL(pselect6, data[0] + 1, &set, NULL, NULL, time, NULL);
    if (IS("select_mask")) CALL(pselect6, data[0] + 1, &set, NULL, NULL, time, &sixth);
    if (IS("ppoll")) CALL(ppoll, &polled, 1, time);
    if (IS("ppoll_mask")) CALL(ppoll, &polled, 1, time, &none, 8);
    if (IS("epoll_pwait")) CALL(epoll_pwait, epoll, &event, 1, milliseconds);
    if (IS("epoll_pwait2")) CALL(epoll_pwait2, epoll, &event, 1, time);
    if (IS("futex")) CALL(futex, word, FUTEX_WAIT, 0, time);
    if (IS("io_getevents")) CALL(io_getevents, prepare_aio(data[0]), 1, 1, events, time);
    if (IS("io_pgetevents")) CALL(io_pgetevents, prepare_aio(data[0]), 1, 1, events, time);
    if (IS("nanosleep")) CALL(nanosleep, time, NULL);
    if (IS("clock_nanosleep")) CALL(clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &absolute);
    if (IS("io_uring_enter")) {
        int ring = prepare_io_uring(data[0]);
        getevents.ts = (unsigned long)time;
        int flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
        if (ring >= 0) CALL(io_uring_enter, ring, 0, 1, flags, &getevents, sizeof(getevents));
    }
#ifdef __x86_64__
    if (IS("pause")) CALL(pause, 0);
    if (IS("poll")) CALL(poll, &polled, 1, milliseconds);
    if (IS("epoll_wait")) CALL(epoll_wait, epoll, &event, 1, milliseconds);
    if (IS("old select")) CALL(select, data[0] + 1, &set, NULL, NULL, endless ? NULL : &timeval);
#endif
    if (number < 0) {
        puts("unknown");
        return 0;
    }
    int fd = open(argv[1], O_RDONLY);
    double begin = now();
    clock_gettime(CLOCK_MONOTONIC, &absolute);
    absolute.tv_sec += limit.tv_sec;
    absolute.tv_nsec += limit.tv_nsec;
    if (absolute.tv_nsec >= 1000000000) { absolute.tv_nsec -= 1000000000; absolute.tv_sec++; }
    printf("ready %ld\n", number);
    fflush(stdout);
    errno = 0;
    long result = syscall(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
    int error = errno;
    double spent = now() - begin;
    pread(fd, contents, 3, 0);
    contents[3] = 0;
    printf("%ld %d %d %d %s\n", result, error, handled, (int)(1000 * spent), contents);
    fflush(stdout);
    return 0;
}
