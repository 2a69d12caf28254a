/*
 * A C restorer of old, with its byte stream, and the process that it restores in one: mounts, creates a file as such a
 * restorer does, asks for the real mount, blocks the file system, and then reads the file that it has open.
 *
 * old_restorer SOCKET MOUNTPOINT SOURCE CGROUP auto|hold
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void ask(int sock, const char *request, size_t length)
{
	int status;

	if (send(sock, request, length, MSG_EOR) != (ssize_t)length)
		fail("send");
	if (recv(sock, &status, sizeof(status), 0) != sizeof(status))
		fail("recv");
	if (status) {
		errno = -status;
		fail(request);
	}
}

static void create(int root)
{
	int fd;

	if (mkdirat(root, "dir", 0777) && errno != EEXIST)
		fail("mkdirat");
	fd = openat(root, "dir/file", O_CREAT | O_EXCL | O_WRONLY, 0777);
	if (fd < 0 || faccessat(root, "dir/file", W_OK | R_OK | X_OK, 0) || ftruncate(fd, 10))
		fail("dir/file");
	close(fd);
	if (mkfifoat(root, "fifo", 0777) || faccessat(root, "fifo", W_OK | R_OK | X_OK, 0))
		fail("fifo");
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int sock = socket(AF_UNIX, SOCK_SEQPACKET, 0), root, fd, hold;
	char request[4096], buffer[100];
	struct stat file, there;
	size_t length;
	ssize_t got;

	if (argc != 6)
		return 2;
	hold = !strcmp(argv[5], "hold");
	umask(0);
	strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
	if (connect(sock, (struct sockaddr *)&address, sizeof(address)))
		fail("connect");
	length = snprintf(request, sizeof(request),
			  "mount;id=%d;mode=restore;mountpoint=%s;ns_pid=%d;ns_list=user,net,mnt;root=%s", 412, argv[2],
			  getpid(), "(null)");
	ask(sock, request, length + 1);

	root = open(argv[2], O_RDONLY | O_DIRECTORY);
	create(root);
	close(root);
	snprintf(buffer, sizeof(buffer), "%s/dir/file", argv[2]);
	fd = open(buffer, O_RDWR);
	if (fd < 0 || lseek(fd, 3, SEEK_SET) != 3)
		fail(buffer);

	/* The last ';' becomes the NUL between the request and the mount's options. */
	length = snprintf(request, sizeof(request),
			  "replace;id=%d;source=%s;type=%s;flags=%ld;bindmounts=%s;freeze_cgroup=%s/;%s", 412, argv[3],
			  "none", 4096L, "(null)", argv[4], hold ? "mode=hold;" : "");
	request[length - 1] = '\0';
	length += snprintf(request + length, sizeof(request) - length, "%s", "rw");
	ask(sock, request, length + 1);

	/* What its action script then sends. */
	length = snprintf(request, sizeof(request), "mode;all;mode=%s", getenv("SPFS_MODE"));
	ask(sock, request, length + 1);
	if (hold)
		ask(sock, "replace;all;mode=release", sizeof("replace;all;mode=release"));
	printf("blocked\n");
	fflush(stdout);

	got = read(fd, buffer, sizeof(buffer));
	if (got < 0)
		fail("read");
	printf("%.*s\n", (int)got, buffer);
	fflush(stdout);
	if (getchar() == EOF) /* until the replace is done */
		return 1;
	if (fstat(fd, &file) || stat(argv[2], &there) || file.st_dev != there.st_dev)
		fail("another file system");
	printf("%ld\n", (long)lseek(fd, 0, SEEK_CUR));
	return 0;
}
