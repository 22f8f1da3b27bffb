/* A SPANK plugin with the options of pyxis that the scripts use, for a cluster without images. A task with an image gets
 * a mount namespace in which the machine's Slurm commands are gone, as in a usual image, and says on stderr what it was
 * given. An image that is a path, and every source of a mount, must exist, as for pyxis.
 * Built by the tests: gcc -shared -fPIC (slurm/spank.h is in Debian's libslurm-dev). */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(container_options, 1)

enum { IMAGE, MOUNTS, WORKDIR, NO_HOME, COUNT };
static char *given[COUNT];

static int note(int which, const char *text, int remote)
{
	(void)remote;
	given[which] = strdup(text ? text : "yes");
	return given[which] ? 0 : -1;
}

static struct spank_option options[] = {
	{ "container-image", "IMAGE", "image of the container", 1, IMAGE, note },
	{ "container-mounts", "SRC:DST,...", "mounts of the container", 1, MOUNTS, note },
	{ "container-workdir", "PATH", "where its command starts", 1, WORKDIR, note },
	{ "no-container-mount-home", NULL, "without the home folder", 0, NO_HOME, note },
	SPANK_OPTIONS_TABLE_END
};

int slurm_spank_init(spank_t spank, int count, char **words)
{
	(void)count, (void)words;
	for (struct spank_option *option = options; option->name; option++)
		if (spank_option_register(spank, option) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

static int refuse(const char *what, const char *which)
{
	slurm_error("container: %s %s", what, which);
	return -1;
}

/* In the task, as root, before it becomes the user. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char **words)
{
	static const char *hidden[] = { "/usr/bin/scontrol", "/usr/bin/srun", "/usr/bin/sbatch", "/usr/bin/squeue" };
	(void)spank, (void)count, (void)words;
	if (!given[IMAGE])
		return 0;
	if (given[IMAGE][0] == '/' && access(given[IMAGE], R_OK))
		return refuse("no image", given[IMAGE]);
	char *mounts = strdup(given[MOUNTS] ? given[MOUNTS] : ""), *rest = mounts;
	for (char *mount; (mount = strsep(&rest, ","));) {
		char *target = strchr(mount, ':');
		if (!target)
			return refuse("no SOURCE:TARGET in mount", mount);
		*target = 0;
		if (access(mount, F_OK))
			return refuse("no source of mount", mount);
	}
	free(mounts);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return refuse("no namespace for", given[IMAGE]);
	for (unsigned i = 0; i < sizeof hidden / sizeof *hidden; i++)
		mount("/dev/null", hidden[i], NULL, MS_BIND, NULL);
	return 0;
}

/* In the task, as the user. */
int slurm_spank_task_init(spank_t spank, int count, char **words)
{
	(void)spank, (void)count, (void)words;
	if (!given[IMAGE])
		return 0;
	if (given[WORKDIR] && chdir(given[WORKDIR]))
		return refuse("no folder", given[WORKDIR]);
	dprintf(2, "container: image %s mounts %s workdir %s\n", given[IMAGE], given[MOUNTS] ? given[MOUNTS] : "none",
		given[WORKDIR] ? given[WORKDIR] : "none");
	return 0;
}
